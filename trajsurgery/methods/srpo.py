"""SRPO (Shen et al., 2025, arXiv 2509.06942): known noise put on the image, one step with gradient, and taken off."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import uniform
from trajsurgery.node import Time
from trajsurgery.plan import Plan, latent


def srpo(k: Time, j: Time, field: str | None = None) -> Plan:
    """x_0 ~> x_k -> x^_j|k ~> x^_0: noise injection, one step from k to j, analytic recovery with the same noise.

    Gradient, k and j standing for their sigmas: - (k - j) / (1 - j) dv(x_k)/dtheta, at the renoised x_k.

    Args:
        k, j: times, T > k > j >= 1, or names.
        field: the name of the field that takes the step (SRPO's is guided, its rollout is not); the rollout's own if
            left out.
    """
    x_k = latent(0).renoise(k)
    return Plan(x_k.leap(j, velocity=x_k.velocity(field)).recover())


@dataclass(frozen=True)
class SRPO:
    """Draws k uniformly from the times at which a step of `step` still ends above the image; j = k - step.

    Deviations: the original rolls out at guidance 1 and steps at 3.5, here both have the rollout's guidance; how it
    draws its times could not be checked against it. Its reward is a difference of two prompts' scores, a reward of
    your own.
    """

    step: int = 1

    weights_at = "none"
    """SRPO has no trajectory to be near to."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps.

        Raises:
            PlanError: no time is left between the step and T.
        """
        free = steps - 1 - self.step  # k in step + 1 .. T - 1: at T nothing of the image is left
        if self.step < 1 or free < 1:
            raise PlanError(f"SRPO(step={self.step}) on {steps} steps: a step is at least 1 and at most {steps - 2}.")
        k = self.step + 1 + uniform(free, generator)
        return Plan(*srpo(k, k - self.step).outputs, steps=steps)
