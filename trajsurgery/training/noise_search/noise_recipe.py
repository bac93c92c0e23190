"""A search for one prompt's noise as one frozen value: what ascent.py climbs with. It holds no tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trajsurgery.errors import RecipeError
from trajsurgery.training.noise_search.ascent import AscentSettings


@dataclass(frozen=True)
class NoiseRecipe:
    """Finds the noise from which a pipeline paints one prompt best, by the reward's gradient; no weight changes."""

    preset: Literal["tiny", "paper"] = "tiny"
    """tiny is the embedded Flux on a CPU; paper is FLUX.1-schnell in one step, with the authors' numbers."""
    prompt: str = "a red circle left of a blue square"
    """What is to be painted."""
    model: str = "tiny"
    """tiny (the embedded Flux), tiny:sd3, a folder that diffusers can load, or a hub id that is cached."""
    reward: str = "tiny"
    """As in the other recipes: tiny, tiny:SCORER, hpsv2.1, ..., NAME:FILE, remote:HOST:PORT, or MODULE:NAME."""
    steps: int = 2
    """T, the sampler's steps: 1 to 4 keep all activations, more are run again in the backward pass."""
    iterations: int = 50
    """Images graded; a finished run goes on if there are more of them."""
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
            raise RecipeError("the prompt is empty: say what is to be painted, --prompt 'a red circle'.")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (JSON)."""
        return {**asdict(self), "output": str(self.output)}


def presets(output: str) -> dict[str, NoiseRecipe]:
    """On the embedded world, and the authors' numbers on FLUX.1-schnell (their code's only flow-matching model).

    The embedded world's noise has 256 numbers where theirs has 16384: with a fifth of their rate a step is as long
    beside it as theirs.
    """
    tiny = NoiseRecipe(climb=AscentSettings(rate=1.0), output=Path(output))
    large = {"model": "black-forest-labs/FLUX.1-schnell", "reward": "hpsv2.1", "steps": 1, "size": 512, "guidance": 0.0}
    paper = replace(tiny, preset="paper", prompt="A red dog and a green cat", climb=AscentSettings(), **large)
    return {"tiny": tiny, "paper": replace(paper, output=Path(f"{output}_paper"))}
