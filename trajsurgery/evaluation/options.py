"""Options of the commands. This file imports nothing heavy, so `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction


@dataclass(frozen=True)
class Score:
    """Score pictures with rewards."""

    images: Positional[tuple[Path, ...]]
    """Picture files, or folders of them."""
    prompts: Path
    """One prompt a line in the order of the pictures, or rows of {"image": NAME, "prompt": TEXT} as JSONL or JSON."""
    reward: UseAppendAction[tuple[str, ...]]
    """hpsv2.1, pickscore, imagereward, ... as in recipes; may be given several times."""
    output: Path | None = None
    """Where the scores are written, as JSON; scores.json beside the prompts if left out."""
    batch: int = 1
    """Pictures at once, of those that have one size."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Evaluate:
    """Make images of prompts with a model and with models tuned from it, and compare their scores.

    The same command resumes after an interruption. Each model's image folder has the layout that the official GenEval
    evaluator reads.
    """

    prompts: str
    """tiny, tiny:validation, or a file: text, CSV, JSONL, JSON or parquet, as HPDv2, MJHQ-30K and GenEval have it."""
    reward: UseAppendAction[tuple[str, ...]]
    """As in recipes; may be given several times. Images of the embedded world are also judged by its rules."""
    model: str | None = None
    """tiny, tiny:sd3, a folder that diffusers can load, or a hub id that is cached; by default the model that
    the first --tuned was tuned from, or tiny.
    """
    model_variant: str | None = None
    """In the names of the model's weight files: fp16 for model.fp16.safetensors; by default the run's."""
    transformer: str | None = None
    """Another transformer for the model, one file or a folder; by default the run's."""
    tuned: UseAppendAction[tuple[str, ...]] = ()
    """What to compare: the folder of a run, its transformer folder, adapters (a folder or file that load_lora_weights
    reads), or another model; may be given several times.
    """
    images: int = 4
    """Images a prompt."""
    limit: int | None = None
    """So many prompts, spread evenly over the categories; all by default."""
    steps: int | None = None
    """Sampler steps; by default those of the run's evaluation, or 50."""
    guidance: float | None = None
    """guidance_scale; by default the run's, or the pipeline's own."""
    height: int | None = None
    """In pixels; by default the run's size, or the pipeline's own."""
    width: int | None = None
    """In pixels."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the transformer under autocast."""
    compile: bool = False
    """Compiles the transformer's repeated blocks (torch.compile), which changes an image slightly."""
    batch: int = 4
    """Images at once. It changes an image slightly: other batch sizes round differently."""
    seed: int = 0
    """Determines all noise; the seed of each image is in evaluation.json."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    output: Path = Path("outputs/evaluation")
    """Folder for images and figures."""
    overwrite: bool = False
    """Discard the images of another evaluation in the output folder."""
