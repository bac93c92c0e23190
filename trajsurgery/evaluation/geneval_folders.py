"""Make images in the folder layout of the official GenEval evaluator. Images that exist are not made again.

    FOLDER/00000/metadata.jsonl     the prompt's row: {"tag", "include", "prompt"} (github.com/djghosh13/geneval)
    FOLDER/00000/samples/0000.png   its images

Each image has its own generator, and batches are always the same. So an image equals, bit for bit, that of a plain call
of the pipeline with the batch's prompts and generators, whenever it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trajsurgery.errors import RecipeError
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.prompts import Prompt


@dataclass(frozen=True)
class Sample:
    """One image to make."""

    number: int
    """Number of its prompt, from 0."""
    prompt: Prompt
    index: int
    """Among the images of its prompt, from 0."""
    seed: int

    @property
    def facts(self) -> dict[str, Any]:
        """Everything about the sample as plain values, for tables."""
        seeds = {"number": self.number, "index": self.index, "seed": self.seed}
        return {**seeds, "category": self.prompt.category, "prompt": self.prompt.text}

    def path(self, folder: Path) -> Path:
        """Return the path of the image file."""
        return folder / f"{self.number:05d}" / "samples" / f"{self.index:04d}.png"


def list_samples(prompts: Sequence[Prompt], images: int, seed: int) -> list[Sample]:
    """Return all images, prompt by prompt, each with a seed of its own."""
    return [
        Sample(number, prompt, index, seed * 2**40 + number * 2**16 + index)
        for number, prompt in enumerate(prompts)
        for index in range(images)
    ]


def write_metadata(folder: Path, samples: Sequence[Sample]) -> None:
    """Write each prompt's metadata.jsonl: the row of its file, with the tag and the prompt that GenEval reads."""
    for number, prompt in {sample.number: sample.prompt for sample in samples}.items():
        row = {"tag": prompt.category, "include": [], **(prompt.record or {}), "prompt": prompt.text}
        path, text = folder / f"{number:05d}" / "metadata.jsonl", json.dumps(row, default=str) + "\n"
        if not path.is_file():
            write_atomically(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))


def missing_samples(folder: Path, samples: Sequence[Sample], batch: int) -> Iterator[tuple[Sample, ...]]:
    """Yield the batches in which an image is missing."""
    for start in range(0, len(samples), batch):
        part = tuple(samples[start : start + batch])
        if not all(sample.path(folder).is_file() for sample in part):
            yield part


@torch.inference_mode()
def make_images(
    pipe: Any,
    call: Mapping[str, Any],
    folder: Path,
    samples: Sequence[Sample],
    batch: int,
    done: Callable[[int], object] = lambda _: None,
) -> None:
    """Make the images that are missing.

    Args:
        call: arguments of the pipeline beside prompts and generators.
        done: called with the number of images made.

    Raises:
        RecipeError: the pipeline makes no images.
    """
    for batch_samples in missing_samples(folder, samples, batch):
        result = pipe(
            prompt=[sample.prompt.text for sample in batch_samples],
            generator=[torch.Generator().manual_seed(sample.seed) for sample in batch_samples],
            output_type="pil",
            **call,
        )
        images: Any = getattr(result, "images", None)
        if images is None or len(images) != len(batch_samples) or not all(hasattr(image, "save") for image in images):
            kind = type(result).__name__ if images is None else f"{len(images)} {type(images[0]).__name__}"
            raise RecipeError(
                f"{type(pipe).__name__} gave {kind} for {len(batch_samples)} prompts: evaluate compares images."
            )
        for sample, image in zip(batch_samples, images):
            path = sample.path(folder)
            if not path.is_file():
                write_atomically(path, lambda partial, image=image: image.save(partial, format="PNG"))
        done(len(batch_samples))
