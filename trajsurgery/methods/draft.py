"""DRaFT-LV (Clark et al., 2024, arXiv 2309.17400): the last step's gradient, and those of renoised images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trajsurgery.errors import PlanError
from trajsurgery.plan import Plan, latent


def draft_lv(n: int = 2) -> Plan:
    """x_1 -> x^_0|1, and n times x_0 ~> x_1^(i) -> x^_0|1: DRaFT-LV as in LeapAlign's Algorithm 1.

    Gradient of each of the n + 1 outputs, with s the sigma of t = 1: - s dv(x_1)/dtheta at its own x_1. The loss sums
    over outputs, as Algorithm 1 does (FlowBP averages). No other deviation.

    Args:
        n: how often the image is noised anew, each time with a noise of its own.

    Raises:
        PlanError: n is below 0.
    """
    if n < 0:
        raise PlanError(f"draft_lv(n={n}): the image is noised anew 0 or more times.")
    renoised = [latent(0).renoise(1, draw=i).leap(0) for i in range(n)]
    return Plan(latent(1).leap(0), *renoised)


@dataclass(frozen=True)
class DRaFTLV:
    """DRaFT-LV with `n` renoised samples (2 in appendix E). Nothing is drawn but the noises."""

    n: int = 2

    weights_at = "none"
    """Algorithm 1, line 40: w = 1."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps."""
        return Plan(*draft_lv(self.n).outputs, steps=steps)
