"""Images of prompts in the folders that the official GenEval evaluator reads; those that are there are not made again.

    FOLDER/00000/metadata.jsonl     the prompt's row: {"tag", "include", "prompt"} (github.com/djghosh13/geneval)
    FOLDER/00000/samples/0000.png   its images

Each image has a generator of its own, and images are made in batches that are always the same, so that an image equals,
bit for bit, the one of a plain call of the pipe with the batch's prompts and generators, whenever it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trajsurgery.errors import RecipeError
from trajsurgery.training.checkpoint import write_whole
from trajsurgery.training.prompts import Prompt


@dataclass(frozen=True)
class Sample:
    """An image that is asked for."""

    number: int
    """Of its prompt, from 0."""
    prompt: Prompt
    index: int
    """Among the images of its prompt, from 0."""
    seed: int

    def path(self, folder: Path) -> Path:
        """Where it is kept."""
        return folder / f"{self.number:05d}" / "samples" / f"{self.index:04d}.png"


def samples(prompts: Sequence[Prompt], images: int, seed: int) -> list[Sample]:
    """All images, prompt by prompt; no two of a seed share theirs."""
    return [
        Sample(number, prompt, index, seed * 2**40 + number * 2**16 + index)
        for number, prompt in enumerate(prompts)
        for index in range(images)
    ]


def write_rows(folder: Path, asked: Sequence[Sample]) -> None:
    """Each prompt's metadata.jsonl: the row that it was read from, with the tag and the prompt that GenEval reads."""
    for sample in asked:
        if sample.index == 0:
            known = dict(sample.prompt.record or {})
            row = {"tag": sample.prompt.category, "include": [], **known, "prompt": sample.prompt.text}
            path = folder / f"{sample.number:05d}" / "metadata.jsonl"
            if not path.is_file():
                text = json.dumps(row, default=str) + "\n"
                write_whole(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))


def missing(folder: Path, asked: Sequence[Sample], batch: int) -> Iterator[tuple[Sample, ...]]:
    """The batches of which an image is not there."""
    for start in range(0, len(asked), batch):
        part = tuple(asked[start : start + batch])
        if not all(sample.path(folder).is_file() for sample in part):
            yield part


def make(
    pipe: Any,
    call: Mapping[str, Any],
    folder: Path,
    asked: Sequence[Sample],
    batch: int,
    done: Callable[[int], object] = lambda _: None,
) -> None:
    """Makes the images that are not there.

    Args:
        call: what the pipe is called with, beside prompts and generators.
        done: told how many images were made.

    Raises:
        RecipeError: the pipe makes no images.
    """
    for part in missing(folder, asked, batch):
        found = pipe(
            prompt=[sample.prompt.text for sample in part],
            generator=[torch.Generator().manual_seed(sample.seed) for sample in part],
            output_type="pil",
            **call,
        )
        images: Any = getattr(found, "images", None)
        if images is None or len(images) != len(part) or not all(hasattr(image, "save") for image in images):
            kind = type(found).__name__ if images is None else f"{len(images)} {type(images[0]).__name__}"
            raise RecipeError(f"{type(pipe).__name__} gave {kind} for {len(part)} prompts: evaluate compares images.")
        for sample, image in zip(part, images):
            path = sample.path(folder)
            if not path.is_file():
                write_whole(path, lambda partial, image=image: image.save(partial, format="PNG"))
        done(len(part))
