"""DRaFT (Clark et al., 2024, arXiv 2309.17400) and AlignProp (Prabhudesai et al., 2023, arXiv 2310.03739)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import Method, uniform
from trajsurgery.plans.plan import Plan, latent

if TYPE_CHECKING:
    import torch


def draft_k(k: int) -> Plan:
    """x_k -> x_{k-1} -> ... -> x_0, plain backpropagation through the last k steps: DRaFT-K; k = T is all of them.

    Gradient, with s_t the length of the step at t and the product running from the image's side:

        - sum over t <= k of s_t [prod over u < t of (1 - s_u dv/dx_u)] dv(x_t)/dtheta

    No deviation.

    Args:
        k: the number of steps; 1 is DRaFT-1, whose gradient is - s_1 dv(x_1)/dtheta.

    Raises:
        PlanError: k is below 1.
    """
    if k < 1:
        raise PlanError(f"draft_k({k}): the gradient runs through at least the last step.")
    x = latent(k)
    for t in range(k, 0, -1):
        x = x.leap(t - 1)
    return Plan(x)


def whole_trajectory(steps: int) -> Plan:
    """x_T -> x_{T-1} -> ... -> x_0: plain backpropagation through all T steps, as DRaFT's and AlignProp's longest.

    Gradient: `draft_k`'s with k = T, 2^T - 1 terms, the nested ones of every order. No deviation. Run it with
    memory="recompute" or staged: its memory is then that of one call.

    Raises:
        PlanError: `steps` is below 1.
    """
    return Plan(*draft_k(steps).outputs, steps=steps)


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
class DRaFT1(Method):
    """DRaFT-1: the last step. Nothing is drawn."""

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        return draft_k(1)


@dataclass(frozen=True)
class WholeTrajectory(Method):
    """Backpropagation through all steps. Nothing is drawn."""

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        return whole_trajectory(steps)


@dataclass(frozen=True)
class DRaFTK(Method):
    """DRaFT-K: the last `k` steps; 1 is DRaFT-1, None the whole trajectory. Nothing is drawn."""

    k: int | None = 1

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        return draft_k(steps if self.k is None else self.k)


@dataclass(frozen=True)
class AlignProp(Method):
    """AlignProp: DRaFT-K with K drawn uniformly from 1..`most` in each iteration; None is T.

    Gradient: as `draft_k`'s. Deviation: the original keeps activations by checkpointing, here `memory` says how.
    """

    most: int | None = None

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        most = steps if self.most is None else self.most
        if not 1 <= most <= steps:
            raise PlanError(f"AlignProp(most={most}) on {steps} steps: the gradient runs through 1..{steps} of them.")
        return draft_k(1 + uniform(most, generator))


@dataclass(frozen=True)
class DRaFTLV(Method):
    """DRaFT-LV with `n` renoised samples (2 in appendix E). Nothing is drawn but the noises."""

    n: int = 2

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        return draft_lv(self.n)
