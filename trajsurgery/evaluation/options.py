"""What the commands take. Nothing heavy is imported here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction


@dataclass(frozen=True)
class Score:
    """Scores pictures with rewards."""

    images: Positional[tuple[Path, ...]]
    """Picture files, or folders of them."""
    prompts: Path
    """One prompt a line in the order of the pictures, or JSONL of {"image": NAME, "prompt": TEXT}."""
    reward: UseAppendAction[tuple[str, ...]]
    """hpsv2.1, pickscore, imagereward, ... as in recipes; may be given several times."""
    output: Path | None = None
    """Where the scores are written, as JSON; scores.json beside the prompts if left out."""
    batch: int = 1
    """Pictures at once, of those that have one size."""


@dataclass(frozen=True)
class Evaluate:
    """Makes images of prompts with a model, and with what was tuned from it, and compares their scores.

    The same command goes on after an interruption. Each model's folder of images is laid out as the official GenEval
    evaluator reads it.
    """

    prompts: str
    """tiny, tiny:validation, or a file: text, JSONL, JSON, parquet, also as HPDv2, MJHQ-30K and GenEval have them."""
    reward: UseAppendAction[tuple[str, ...]]
    """As in recipes; may be given several times. Images of the embedded world are judged by its rules as well."""
    model: str | None = None
    """tiny, tiny:sd3, a folder that diffusers can load, or a hub id that is cached; else what the first --tuned was
    tuned from, or tiny."""
    tuned: UseAppendAction[tuple[str, ...]] = ()
    """What is compared with it: the folder of a run, its transformer folder, adapters (a folder or file that
    load_lora_weights reads), or another model; may be given several times."""
    images: int = 4
    """Images a prompt."""
    limit: int | None = None
    """So many prompts, spread evenly over the categories; all if left out."""
    steps: int | None = None
    """The sampler's; if left out those of the run's evaluation, or 50."""
    guidance: float | None = None
    """guidance_scale; if left out the run's, or the pipeline's own."""
    height: int | None = None
    """In pixels; if left out the run's size, or the pipeline's own."""
    width: int | None = None
    """In pixels."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the transformer under autocast."""
    batch: int = 4
    """Images at once. It is part of what makes an image: other sizes round in another way."""
    seed: int = 0
    """All noise follows from it; the seed of each image is in evaluation.json."""
    output: Path = Path("outputs/evaluation")
    """Where images and figures are written."""
    overwrite: bool = False
    """Discard the images of another evaluation in the output folder."""
