"""A search for one prompt's noise as one frozen value: what noise_search.py runs. It holds no tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trajsurgery.errors import RecipeError
from trajsurgery.training.settings import ModelSource


@dataclass(frozen=True)
class AscentSettings:
    """Settings of the optimizer on x_T; defaults are the authors'."""

    rate: float = 5.0
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Nesterov momentum."""
    clip: float = 0.1
    """The gradient's norm is clipped to it; a step is at most rate * clip / (1 - momentum) long."""
    penalty: float = 0.01
    """Weight of the negative log density of the norm."""
    weight: float = 5.0
    """Weight of the reward (the authors': 5 for HPSv2, 1 for ImageReward, 0.05 for PickScore's logits, 1 for a cosine).
    """

    def __post_init__(self) -> None:
        ranges = {
            f"rate = {self.rate}": 0 < self.rate < math.inf,
            f"momentum = {self.momentum}": 0 < self.momentum < 1,
            f"clip = {self.clip}": self.clip > 0,
            f"penalty = {self.penalty}": 0 <= self.penalty < math.inf,
            f"weight = {self.weight}": 0 < self.weight < math.inf,
        }
        wrong = [f"climb.{name}" for name, holds in ranges.items() if not holds]
        if wrong:
            raise RecipeError(
                f"{', '.join(wrong)}: rate and weight are finite and above 0, clip is above 0 (inf does not clip), "
                "momentum lies between 0 and 1, penalty is finite and at least 0."
            )


@dataclass(frozen=True)
class NoiseRecipe:
    """Finds the noise from which a pipeline makes the best image of one prompt, by the reward's gradient."""

    preset: Literal["tiny", "paper"] = "tiny"
    """tiny is the embedded Flux on a CPU; paper is FLUX.1-schnell in one step, with the authors' numbers."""
    prompt: str = "a red circle left of a blue square"
    """What the image is to show."""
    model: str = "tiny"
    """tiny (the embedded Flux), tiny:sd3, a folder that diffusers can load, or a hub id that is cached."""
    model_variant: str | None = None
    """In the names of the model's weight files: fp16 for model.fp16.safetensors. Left out, plain names."""
    transformer: str | None = None
    """Another transformer for the model: one file, as other tools have it (flux1-dev.safetensors), or a folder."""
    reward: str = "tiny"
    """As in the other recipes: tiny, tiny:SCORER, hpsv2.1, ..., NAME:FILE, remote:HOST:PORT, MODULE:NAME, FILE.py:NAME.
    """
    steps: int = 2
    """T, the sampler's steps: 1 to 4 keep all activations, more are run again in the backward pass."""
    iterations: int = 50
    """Images scored; a finished run goes on if there are more of them."""
    climb: AscentSettings = field(default_factory=AscentSettings)
    size: int | None = 32
    """Height and width of the image in pixels; the pipeline's own if left out."""
    guidance: float = 3.5
    """The pipeline's guidance_scale."""
    seed: int = 0
    """Of the first noise."""
    pictures: int = 8
    """Images in filmstrip.png."""
    save_every: int = 5
    """Iterations between checkpoints: what a killed run has to repeat."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    threads: int = 1
    """Threads of torch on the CPU."""
    output: Path = Path("outputs/reno_flux")
    """Where everything is written. A run that was interrupted there goes on."""
    overwrite: bool = False
    """Discard what an earlier run left in the output folder."""

    def __post_init__(self) -> None:
        counts = ("steps", "iterations", "size", "pictures", "save_every", "threads")
        wrong = [f"{name} = {n}" for name in counts if (n := getattr(self, name)) is not None and n < 1]
        if wrong:
            raise RecipeError(f"{', '.join(wrong)}: each is at least 1.")
        if not self.prompt.strip():
            raise RecipeError("the prompt is empty: say what the image is to show, --prompt 'a red circle'.")

    @property
    def source(self) -> ModelSource:
        """Where the model's files are."""
        return ModelSource(self.model, self.model_variant, self.transformer)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict (JSON)."""
        return {**asdict(self), "output": str(self.output)}


def presets(output: str) -> dict[str, NoiseRecipe]:
    """Return presets: the embedded world, and the authors' settings on FLUX.1-schnell, their only flow-matching model.

    The embedded world's noise has 256 numbers, theirs has 16384: a fifth of their rate makes steps of about the same
    length, relative to the norm of the noise.
    """
    tiny = NoiseRecipe(climb=AscentSettings(rate=1.0), output=Path(output))
    large = {"model": "black-forest-labs/FLUX.1-schnell", "reward": "hpsv2.1", "steps": 1, "size": 512, "guidance": 0.0}
    paper = replace(tiny, preset="paper", prompt="A red dog and a green cat", climb=AscentSettings(), **large)
    return {"tiny": tiny, "paper": replace(paper, output=Path(f"{output}_paper"))}
