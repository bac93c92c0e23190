"""ReNO (Eyring et al., 2024, arXiv 2406.04312): gradient ascent of a reward in the initial noise x_T; weights stay
frozen.

The loss is - weight * reward(image) + penalty * (|x_T|^2 / 2 - (d - 1) log |x_T|). Its gradient passes through decoder
and sampler to x_T (`reno`), is clipped, and SGD with Nesterov momentum takes a step. The second term is the negative
log density of the norm of d Gaussian numbers, smallest at |x_T| = sqrt(d - 1).

Deviations from the authors' code: several sampler steps instead of one; one reward with one weight (a sum is
`Weighted`); float32, not float16; each reward does its own preprocessing instead of sharing one crop. A gradient that
is not finite ends the search. The best noise is the one with the highest reward, whatever its penalty, as theirs is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.methods.reno import reno
from trajsurgery.pipelines.operate import operate
from trajsurgery.rewards.loading import Reward
from trajsurgery.training.objective import DETACHED

RETAINED = 4
"""Up to this many steps keep their activations by default; longer rollouts are recomputed step by step."""


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
    reward: str = "tiny"
    """As in the other recipes: tiny, tiny:SCORER, hpsv2.1, ..., NAME:FILE, remote:HOST:PORT, or MODULE:NAME."""
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


@dataclass(frozen=True, eq=False)
class RewardPath:
    """From a noise to a score: a pipeline, the arguments of its calls, and a reward."""

    pipe: Any
    """A diffusers pipeline, frozen."""
    reward: Reward
    prompt: str
    steps: int
    """T."""
    call: Mapping[str, Any]
    """Arguments of the pipeline beside its steps and latents."""
    memory: Literal["retain", "recompute"] | None = None
    """By default retain up to RETAINED steps, else recompute."""

    def start(self, generator: torch.Generator) -> Tensor:
        """Draw x_T as the pipeline does, [1, *latent], in the form of its `latents` argument."""
        with operate(self.pipe) as surgery:
            self.pipe(**self.call, num_inference_steps=self.steps, generator=generator, output_type="latent")
        return surgery.trajectory[self.steps].clone()

    def score_gradient(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image [1, ...], its score [1], and the score's gradient with respect to x_T.

        Raises:
            RecipeError: the reward's scores carry no gradient.
        """
        plan = reno(*range(self.steps - 1, 0, -1))
        memory = self.memory or ("retain" if self.steps <= RETAINED else "recompute")
        arguments = {**self.call, "num_inference_steps": self.steps, "latents": x.detach().clone()}
        with operate(self.pipe, plan, memory=memory) as surgery:
            image = self.pipe(**arguments, output_type="pt")[0]
        score = self.reward(image, [self.prompt])
        if not score.requires_grad:
            raise RecipeError(DETACHED)
        start = surgery.trajectory.start
        assert start is not None, "a plan with noise() has a start"
        (gradient,) = torch.autograd.grad(score.sum(), start)
        return image.detach(), score.detach(), gradient


def negative_log_density(x: Tensor) -> Tensor:
    """Return |x|^2 / 2 - (d - 1) log |x|, 0-dim: -log of the density of a Gaussian noise's norm, up to a constant."""
    norm = torch.linalg.vector_norm(x)
    return norm.square() / 2 - (x.numel() - 1) * norm.log()


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of the search."""

    iteration: int
    """From 0, the initial noise."""
    reward: float
    norm: float
    """|x_T|."""
    gradient: float
    """The norm of the loss's gradient, before clipping."""
    image: Tensor
    """[1, ...], in [0, 1]."""


class Ascent:
    """x_T with its optimizer, and the best noise so far."""

    def __init__(self, start: Tensor, climb: AscentSettings) -> None:
        self.climb = climb
        self.x = torch.nn.Parameter(start.detach().clone())
        self.optimiser = torch.optim.SGD([self.x], lr=climb.rate, momentum=climb.momentum, nesterov=True)
        self.iteration = 0
        """Number of the next frame."""
        self.best: tuple[Frame, Tensor] | None = None
        """The frame with the highest reward, and its x_T."""

    def step(self, path: RewardPath) -> Frame:
        """Score the image of x_T, then move x_T.

        Raises:
            RecipeError: score or gradient are not finite, or the reward is detached; x_T is unchanged.
        """
        image, score, reward_gradient = path.score_gradient(self.x)
        (penalty_gradient,) = torch.autograd.grad(negative_log_density(self.x), self.x)
        self.x.grad = self.climb.penalty * penalty_gradient - self.climb.weight * reward_gradient.to(self.x)
        norm = torch.nn.utils.clip_grad_norm_([self.x], self.climb.clip)
        frame = Frame(self.iteration, float(score), float(self.x.detach().norm()), float(norm), image)
        if not math.isfinite(frame.reward) or not math.isfinite(frame.gradient):
            raise RecipeError(
                f"iteration {self.iteration} had the reward {frame.reward} and a gradient of norm {frame.gradient}: "
                "the noise has left what the model knows. Lower --climb.rate, or raise --climb.penalty."
            )
        if self.best is None or frame.reward > self.best[0].reward:
            self.best = frame, self.x.detach().clone()
        self.optimiser.step()
        self.iteration += 1
        return frame

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, once there is a frame."""
        assert self.best is not None
        frame, x = self.best
        ascent = {"x": self.x.detach(), "optimiser": self.optimiser.state_dict(), "iteration": self.iteration}
        return {**ascent, "best": vars(frame), "best_x": x}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        with torch.no_grad():
            self.x.copy_(state["x"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.iteration = state["iteration"]
        self.best = Frame(**state["best"]), state["best_x"].to(self.x)
