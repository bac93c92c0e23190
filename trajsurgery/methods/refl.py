"""ReFL (Xu et al., 2023, arXiv 2304.05977): one late step, one leap to the image, the reward on the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trajsurgery.methods.draws import Method, late_time
from trajsurgery.plans.nodes import Time
from trajsurgery.plans.plan import Plan, latent

if TYPE_CHECKING:
    import torch


def refl(t: Time) -> Plan:
    """x_t -> x^_0|t: ReFL as in LeapAlign's Algorithm 1.

    Gradient: - t dv(x_t)/dtheta. Deviation from the original: no pre-training loss (as the paper, appendix E).
    """
    return Plan(latent(t).leap(0))


@dataclass(frozen=True)
class ReFL(Method):
    """Draws the early-stop time uniformly among the last `last` steps (11 of 25 in appendix E)."""

    last: int = 11

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        return refl(late_time(self.last, steps, generator))
