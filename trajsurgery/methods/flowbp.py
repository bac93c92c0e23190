"""FlowBP (2026, arXiv 2606.11075): few fresh velocities on a trajectory of recorded ones.

Defaults are those of the authors' published configurations. What gradients are scaled by hangs on the lengths of the
sampler's steps: a `StepGain`, which a run computes from the times of its own sampler.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import Method, biased_distinct, dirichlet_pair, distinct
from trajsurgery.plans.nodes import Factor, LatentNode
from trajsurgery.plans.plan import Plan, latent, recorded
from trajsurgery.plans.step_gain import StepGain

if TYPE_CHECKING:
    import torch


def flowbp_sparse(steps: int, active: Collection[int], rescale: float = 1.0) -> Plan:
    """x_T -> ... -> x_0, with gradients at the velocities of `active`, inputs detached, scaled for those left out.

    Gradient, with h_t the length of the step at t, and g = 1 + rescale (sum |h| / sum over active of |h| - 1):

        - g sum over active of h_t dv(x_t)/dtheta

    Args:
        steps: T.
        active: the times of the fresh velocities, in 1..T.
        rescale: 0 leaves the gradients as they are, 1 makes up for all steps that are not active.

    Raises:
        PlanError: no active time.
    """
    gain = _gain(range(1, steps + 1), 0, active, rescale)
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.leap(t - 1, velocity=latent(t).velocity().scale(gain) if t in active else recorded(t))
    return Plan(x.connect(), steps=steps)


def flowbp_bridge(
    steps: int,
    j: int,
    active: Collection[int],
    alpha: Factor = 0.1,
    rescale: float = 1.0,
) -> Plan:
    """FlowBP-Sparse in two parts that meet at x_j, whose network input is discounted by alpha; j is always active.

    Gradient, with g as in `flowbp_sparse`, over all active times S, of which S_1 lie above j:

        - g sum over S of h_t dv(x_t)/dtheta + alpha g^2 h_j sum over S_1 of h_t dv/dx_j dv(x_t)/dtheta

    Args:
        steps: T.
        j: where the parts meet, T > j >= 1.
        active: the times of the fresh velocities beside j, at least one of them above j.
        alpha: the discount of the network's input at j.
        rescale: as `flowbp_sparse`.

    Raises:
        PlanError: no active time above j.
    """
    gain = _gain(range(1, steps + 1), 0, {*active, j}, rescale)
    if not any(t > j for t in active):
        raise PlanError(f"no active time above j = {j}: received active={sorted(active)}. Each part needs one.")
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.connect() if t == j else x
        fresh = x.discount(alpha) if t == j else latent(t)
        x = x.leap(t - 1, velocity=fresh.velocity().scale(gain) if t in {*active, j} else recorded(t))
    return Plan(x.connect(), steps=steps)


def flowbp_lagrange(
    k: int,
    j: int,
    alpha: Factor = 0.1,
    scale: Factor = 0.25,
    rescale: float = 0.5,
) -> Plan:
    """LeapAlign with each leap replaced by Lagrange quadrature over up to three velocities of the trajectory.

    They are evenly spread over the leap's steps, from its start to the last one before it lands, and m in the middle.
    The first is fresh, the second fresh with its gradient scaled, the third recorded: it has a weight and no gradient.
    Gradient, with w the quadrature's weights over sigma, m and n the second times of k -> j and of j -> 0, and g =
    1 + rescale (sum |w| / sum over fresh ones of |w| - 1) of each leap (g_1 of k -> j, g_2 of j -> 0):

        g_2 (w_j dv(x_j)/dtheta + scale w_n dv(x_n)/dtheta) + g_1 (w_k dv(x_k)/dtheta + scale w_m dv(x_m)/dtheta)
        + alpha g_2 w_j dv/dx_j g_1 (w_k dv(x_k)/dtheta + scale w_m dv(x_m)/dtheta)

    Args:
        k: the start of the first leap, T >= k > j.
        j: the start of the second leap, j >= 1.
        alpha: the discount of the network's input at j.
        scale: of the second support's gradient.
        rescale: 0 leaves the gradients as they are, 1 makes up for the recorded velocities.
    """
    x_j = _advance(latent(k), j, latent(k), (scale, rescale)).connect()
    return Plan(_advance(x_j, 0, x_j.discount(alpha), (scale, rescale)).connect())


def supports(start: int, to: int) -> list[int]:
    """Up to three of the times start .. to + 1, evenly spread, the ends among them; falling."""
    last = start - to - 1
    return [start - i for i in sorted({0, round(last / 2), last})]


def _advance(x: LatentNode, to: int, seen: LatentNode, factors: tuple[Factor, float]) -> LatentNode:
    """One leap by quadrature; `seen` is what the network gets at its start."""
    start, (scale, rescale) = int(x.t), factors
    times = supports(start, to)
    gain = _gain(times, to, times[:2], rescale, "lagrange")
    fresh = [seen.velocity(), *(latent(t).velocity().scale(scale) for t in times[1:2])]
    return x.advance(to, [*(v if gain == 1 else v.scale(gain) for v in fresh), *map(recorded, times[2:])])


def _gain(times: Collection[int], to: int, active: Collection[int], rescale: float, rule: str = "euler") -> Factor:
    """What the active velocities' gradients are scaled by: a `StepGain`, or 1 where it is 1 on every sampler."""
    gain = StepGain(sorted(times, reverse=True), active, to, rule, rescale)
    return 1.0 if rescale == 0 or gain.active == gain.times else gain


@dataclass(frozen=True)
class FlowBPSparse(Method):
    """Draws FlowBP-Sparse's `active` times, late ones more often: the odds of t are (T + 1 - t)^bias.

    `rescale` as in `flowbp_sparse`.
    """

    active: int = 3
    bias: float = 2.0
    rescale: float = 1.0

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        if not 1 <= self.active <= steps:
            raise PlanError(f"FlowBPSparse(active={self.active}) on {steps} steps: it lies in 1..{steps}.")
        active = biased_distinct(range(steps, 0, -1), self.active, self.bias, generator)
        return flowbp_sparse(steps, active, self.rescale)


@dataclass(frozen=True)
class FlowBPBridge(Method):
    """Draws FlowBP-Bridge's meeting point j, the later of a uniform pair, and `active` - 1 times beside it.

    They are shared out in proportion to the parts' lengths, at least one above j, and in each part drawn as
    FlowBP-Sparse's are, counted from the part's start. `alpha` and `rescale` as in `flowbp_bridge`.
    """

    active: int = 5
    bias: float = 2.0
    alpha: float = 0.1
    rescale: float = 1.0

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        if not 2 <= self.active <= steps:
            raise PlanError(f"FlowBPBridge(active={self.active}) on {steps} steps: it lies in 2..{steps}.")
        j = 1 + min(distinct(range(steps), 2, generator))
        below = min(self.active - min(max(round(self.active * (steps - j) / steps), 1), self.active - 1), j)
        active = biased_distinct(range(steps, j, -1), self.active - below, self.bias, generator)
        active += biased_distinct(range(j - 1, 0, -1), below - 1, self.bias, generator)
        return flowbp_bridge(steps, j, active, self.alpha, self.rescale)


@dataclass(frozen=True)
class FlowBPLagrange(Method):
    """Draws FlowBP-Lagrange's k and j from a Dirichlet split of the trajectory: shares below j, between, and above k.

    `alpha`, `scale` and `rescale` as in `flowbp_lagrange`. Its tau is 0.2, a setting of the objective.
    """

    alpha: float = 0.1
    scale: float = 0.25
    shares: tuple[float, float, float] = (2.5, 6.0, 2.0)
    rescale: float = 0.5

    weights_at = "all"
    """As LeapAlign's."""

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        k, j = dirichlet_pair(self.shares, steps, generator)
        return flowbp_lagrange(k, j, self.alpha, self.scale, self.rescale)
