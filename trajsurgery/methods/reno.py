"""ReNO (Eyring et al., 2024, arXiv 2406.04312): the initial noise is optimised, the model stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trajsurgery.methods.draws import Method
from trajsurgery.plans.nodes import Time
from trajsurgery.plans.plan import Plan, noise

if TYPE_CHECKING:
    import torch


def reno(*through: Time) -> Plan:
    """x_T -> (x^_t|T --> x_t) -> ... -> (x^_0 --> x_0), with the gradient of x_T: leaps over the times given.

    Without a time it is one leap, the original's one-step generator. Gradient to x_T of one leap, T standing for its
    sigma: dx_T/dx_T - T dv/dx_T; of several, the product of such factors. Deviation: the original knows one step only.
    On a sampler whose steps are not Euler's a leap is a prediction, and its gradient an approximation.

    Args:
        through: times below T, falling, on which leaps land, or names.
    """
    x = noise()
    for to in (*through, 0):
        x = x.leap(to).connect()
    return Plan(x)


@dataclass(frozen=True)
class ReNO(Method):
    """The noise's gradient through every step of the sampler. Nothing is drawn, and no weight trains: see ascent.py."""

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        return reno(*range(steps - 1, 0, -1))
