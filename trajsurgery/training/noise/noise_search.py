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
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.methods.reno import reno
from trajsurgery.pipelines.operate import operate
from trajsurgery.rewards.loading import Reward
from trajsurgery.training.noise.noise_recipe import AscentSettings
from trajsurgery.training.objective import DETACHED

RETAINED = 4
"""Up to this many steps keep their activations by default; longer rollouts are recomputed step by step."""


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
