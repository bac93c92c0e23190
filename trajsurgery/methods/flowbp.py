"""FlowBP (2026, arXiv 2606.11075): few fresh velocities on a trajectory of recorded ones.

Defaults are those of the authors' published configurations. What gradients are scaled by hangs on the lengths of the
sampler's steps; where `sigmas` (the sampler's T + 1 times, noise first) are left out the steps count as evenly long,
which is the one deviation that all three share: exact on the embedded Flux, whose sigmas fall evenly, and not on
FLUX.1-dev, whose sigmas are shifted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import Method, biased_distinct, dirichlet_pair, distinct
from trajsurgery.plans.interpolants import weights
from trajsurgery.plans.nodes import Factor, LatentNode
from trajsurgery.plans.plan import Plan, latent, recorded

if TYPE_CHECKING:
    import torch


def flowbp_sparse(
    steps: int, active: Collection[int], sigmas: Sequence[float] | None = None, rescale: float = 1.0
) -> Plan:
    """x_T -> ... -> x_0, with gradients at the velocities of `active`, inputs detached, scaled for those left out.

    Gradient, with h_t the length of the step at t, and g = 1 + rescale (sum |h| / sum over active of |h| - 1):

        - g sum over active of h_t dv(x_t)/dtheta

    Args:
        steps: T.
        active: the times of the fresh velocities, in 1..T.
        sigmas: the sampler's T + 1 times, noise first, for the lengths; evenly spaced if left out.
        rescale: 0 leaves the gradients as they are, 1 makes up for all steps that are not active.

    Raises:
        PlanError: no active time; another number of sigmas.
    """
    gain = _gain(_lengths(steps, sigmas), active, rescale)
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.leap(t - 1, velocity=latent(t).velocity().scale(gain) if t in active else recorded(t))
    return Plan(x.connect(), steps=steps)


def flowbp_bridge(
    steps: int,
    j: int,
    active: Collection[int],
    alpha: Factor = 0.1,
    sigmas: Sequence[float] | None = None,
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
        sigmas: as `flowbp_sparse`.
        rescale: as `flowbp_sparse`.

    Raises:
        PlanError: no active time above j; another number of sigmas.
    """
    gain = _gain(_lengths(steps, sigmas), {*active, j}, rescale)
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
    sigmas: Sequence[float] | None = None,
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
        sigmas: as `flowbp_sparse`; T is their number less one.
        rescale: 0 leaves the gradients as they are, 1 makes up for the recorded velocities.
    """
    x_j = _advance(latent(k), j, latent(k), (scale, rescale), sigmas).connect()
    return Plan(_advance(x_j, 0, x_j.discount(alpha), (scale, rescale), sigmas).connect())


def supports(start: int, to: int) -> list[int]:
    """Up to three of the times start .. to + 1, evenly spread, the ends among them; falling."""
    last = start - to - 1
    return [start - i for i in sorted({0, round(last / 2), last})]


def _advance(
    x: LatentNode, to: int, seen: LatentNode, factors: tuple[Factor, float], sigmas: Sequence[float] | None
) -> LatentNode:
    """One leap by quadrature; `seen` is what the network gets at its start."""
    start, (scale, rescale) = int(x.t), factors
    times = supports(start, to)
    *points, first, last = [float(t if sigmas is None else sigmas[-1 - t]) for t in (*times, start, to)]
    whole = weights("lagrange", points, first, last)
    gain = _gain(dict(zip(times, map(abs, whole), strict=True)), times[:2], rescale)
    fresh = [seen.velocity(), *(latent(t).velocity().scale(scale) for t in times[1:2])]
    return x.advance(to, [*(v if gain == 1 else v.scale(gain) for v in fresh), *map(recorded, times[2:])])


def _lengths(steps: int, sigmas: Sequence[float] | None) -> dict[int, float]:
    """{t: the length of the step at t}."""
    if sigmas is None:
        return dict.fromkeys(range(1, steps + 1), 1.0)
    if len(sigmas) != steps + 1:
        raise PlanError(f"{len(sigmas)} sigmas for {steps} steps: a sampler of {steps} steps has {steps + 1} times.")
    return {t: abs(float(sigmas[-1 - t]) - float(sigmas[-t])) for t in range(1, steps + 1)}


def _gain(lengths: dict[int, float], active: Collection[int], rescale: float) -> float:
    """1 + rescale (the length of all over that of the active ones, less 1)."""
    chosen = [t for t in lengths if t in active]
    if not chosen:
        raise PlanError(
            f"no active time among the steps {max(lengths)}..{min(lengths)}: received active={sorted(active)}. Give "
            "one at least."
        )
    return 1 + rescale * (sum(lengths.values()) / sum(lengths[t] for t in chosen) - 1)


@dataclass(frozen=True)
class FlowBPSparse(Method):
    """Draws FlowBP-Sparse's `active` times, late ones more often: the odds of t are (T + 1 - t)^bias.

    `sigmas` and `rescale` as in `flowbp_sparse`. Without `sigmas` the steps count as evenly long: give a sampler's that
    are not, `tuple(pipe.scheduler.sigmas.tolist())` after a call.
    """

    active: int = 3
    bias: float = 2.0
    rescale: float = 1.0
    sigmas: tuple[float, ...] | None = None

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        if not 1 <= self.active <= steps:
            raise PlanError(f"FlowBPSparse(active={self.active}) on {steps} steps: it lies in 1..{steps}.")
        active = biased_distinct(range(steps, 0, -1), self.active, self.bias, generator)
        return flowbp_sparse(steps, active, self.sigmas, self.rescale)


@dataclass(frozen=True)
class FlowBPBridge(Method):
    """Draws FlowBP-Bridge's meeting point j, the later of a uniform pair, and `active` - 1 times beside it.

    They are shared out in proportion to the parts' lengths, at least one above j, and in each part drawn as
    FlowBP-Sparse's are, counted from the part's start. `alpha`, `sigmas` and `rescale` as in `flowbp_bridge`.
    """

    active: int = 5
    bias: float = 2.0
    alpha: float = 0.1
    rescale: float = 1.0
    sigmas: tuple[float, ...] | None = None

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        if not 2 <= self.active <= steps:
            raise PlanError(f"FlowBPBridge(active={self.active}) on {steps} steps: it lies in 2..{steps}.")
        j = 1 + min(distinct(range(steps), 2, generator))
        below = min(self.active - min(max(round(self.active * (steps - j) / steps), 1), self.active - 1), j)
        active = biased_distinct(range(steps, j, -1), self.active - below, self.bias, generator)
        active += biased_distinct(range(j - 1, 0, -1), below - 1, self.bias, generator)
        return flowbp_bridge(steps, j, active, self.alpha, self.sigmas, self.rescale)


@dataclass(frozen=True)
class FlowBPLagrange(Method):
    """Draws FlowBP-Lagrange's k and j from a Dirichlet split of the trajectory: shares below j, between, and above k.

    `alpha`, `scale`, `sigmas` and `rescale` as in `flowbp_lagrange`. Its tau is 0.2, a setting of the objective.
    """

    alpha: float = 0.1
    scale: float = 0.25
    shares: tuple[float, float, float] = (2.5, 6.0, 2.0)
    rescale: float = 0.5
    sigmas: tuple[float, ...] | None = None

    weights_at = "all"
    """As LeapAlign's."""

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        _lengths(steps, self.sigmas)
        k, j = dirichlet_pair(self.shares, steps, generator)
        return flowbp_lagrange(k, j, self.alpha, self.scale, self.sigmas, self.rescale)
