"""FlowBP (2026, arXiv 2606.11075): few fresh velocities on a trajectory of recorded ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import biased, split, uniform
from trajsurgery.node import Factor, LatentNode, VelocityNode
from trajsurgery.plan import Plan, latent, recorded


def flowbp_sparse(steps: int, active: Collection[int], sigmas: Sequence[float] | None = None) -> Plan:
    """x_T -> ... -> x_0, with gradients at the velocities of `active`, inputs detached, scaled for those left out.

    Gradient, with h_t the length of the step at t: - (sum |h| / sum over active of |h|) sum over active of
    h_t dv(x_t)/dtheta.

    Args:
        steps: T.
        active: the times of the fresh velocities, in 1..T.
        sigmas: the sampler's T + 1 times, noise first, for the lengths; evenly spaced if left out.

    Raises:
        PlanError: no active time; another number of sigmas.
    """
    _sampler(steps, sigmas)
    gain = _gain(range(1, steps + 1), active, sigmas)
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.leap(t - 1, velocity=latent(t).velocity().scale(gain) if t in active else recorded(t))
    return Plan(x.connect(), steps=steps)


def flowbp_bridge(
    steps: int, j: int, active: Collection[int], alpha: Factor = 0.1, sigmas: Sequence[float] | None = None
) -> Plan:
    """FlowBP-Sparse in two halves that meet at x_j, whose network input is discounted by alpha; j is always active.

    Gradient, with g_1 and g_2 the halves' gains sum |h| / sum over active of |h|, and S_1, S_2 their active times:

        - g_1 sum over S_1 of h_t dv(x_t)/dtheta - g_2 sum over S_2 of h_t dv(x_t)/dtheta
        + alpha g_2 h_j g_1 sum over t in S_1 of h_t dv/dx_j dv(x_t)/dtheta

    Args:
        steps, sigmas: as `flowbp_sparse`.
        j: where the halves meet, T > j >= 1.
        active: the times of the fresh velocities beside j, at least one of them above j.
        alpha: the discount of the network's input at j.

    Raises:
        PlanError: a half without an active time; another number of sigmas.
    """
    _sampler(steps, sigmas)
    first, second = range(j + 1, steps + 1), range(1, j + 1)
    gains = _gain(first, active, sigmas), _gain(second, {*active, j}, sigmas)
    x = latent(steps)
    for t in range(steps, 0, -1):
        if t == j:
            x = x.connect()
            v = x.discount(alpha).velocity().scale(gains[1])
        else:
            v = latent(t).velocity().scale(gains[t < j]) if t in active else recorded(t)
        x = x.leap(t - 1, velocity=v)
    return Plan(x.connect(), steps=steps)


def flowbp_lagrange(k: int, j: int, alpha: Factor = 0.1, scale: Factor = 0.25) -> Plan:
    """LeapAlign with each leap replaced by Lagrange quadrature over up to three velocities of the trajectory.

    The first support is fresh, the second fresh with its gradient scaled, the third recorded: at the leap's start, its
    middle, and its end (1 for the leap to the image). Gradient, with w the quadrature's weights over sigma, and m, n
    the middles of the two leaps (equal to an end, they fall away):

        w_j dv(x_j)/dtheta + scale w_n dv(x_n)/dtheta + w_k dv(x_k)/dtheta + scale w_m dv(x_m)/dtheta
        + alpha w_j dv/dx_j (w_k dv(x_k)/dtheta + scale w_m dv(x_m)/dtheta)

    Deviation: where the supports lie could not be checked against the original.

    Args:
        k, j: times, T >= k > j >= 1.
        alpha: the discount of the network's input at j.
        scale: of the second support's gradient.
    """
    x_j = _advance(latent(k), j, latent(k), scale).connect()
    return Plan(_advance(x_j, 0, x_j.discount(alpha), scale).connect())


def _advance(x: LatentNode, to: int, seen: LatentNode, scale: Factor) -> LatentNode:
    """One leap by quadrature; `seen` is what the network gets at its start."""
    start = int(x.t)
    end = max(to, 1)
    middle = (start + end) // 2
    supports: list[VelocityNode] = [seen.velocity()]
    if end < middle < start:
        supports.append(latent(middle).velocity().scale(scale))
    if end < start:
        supports.append(recorded(end))
    return x.advance(to, supports)


def _sampler(steps: int, sigmas: Sequence[float] | None) -> None:
    if sigmas is not None and len(sigmas) != steps + 1:
        raise PlanError(f"{len(sigmas)} sigmas for {steps} steps: a sampler of {steps} steps has {steps + 1} times.")


def _gain(times: range, active: Collection[int], sigmas: Sequence[float] | None) -> float:
    """The length of all these steps over that of the active ones."""

    def length(t: int) -> float:
        return 1.0 if sigmas is None else abs(float(sigmas[-1 - t]) - float(sigmas[-t]))

    chosen = [t for t in times if t in active]
    if not chosen:
        raise PlanError(
            f"no active time among the steps {times.stop - 1}..{times.start}: received active={sorted(active)}. Each "
            "part of the trajectory needs one."
        )
    return sum(map(length, times)) / sum(map(length, chosen))


@dataclass(frozen=True)
class FlowBPSparse:
    """Draws FlowBP-Sparse's `active` times (K = 3), late ones more often (1 / t; the original's bias is unknown to us).

    `sigmas` are the sampler's, for the lengths of its steps; evenly spaced if left out.
    """

    active: int = 3
    sigmas: tuple[float, ...] | None = None

    weights_at = "none"
    """The trajectory is the sampler's own."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps.

        Raises:
            PlanError: more active times than steps.
        """
        if not 1 <= self.active <= steps:
            raise PlanError(f"FlowBPSparse(active={self.active}) on {steps} steps: it lies in 1..{steps}.")
        return flowbp_sparse(steps, biased(range(1, steps + 1), self.active, generator), self.sigmas)


@dataclass(frozen=True)
class FlowBPBridge:
    """Draws FlowBP-Bridge's meeting point, uniform, and `active` - 1 times beside it, at least one of them above it.

    `alpha` and `sigmas` as in `flowbp_bridge`; how the original draws could not be checked.
    """

    active: int = 3
    alpha: float = 0.1
    sigmas: tuple[float, ...] | None = None

    weights_at = "none"
    """The trajectory is the sampler's own."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps.

        Raises:
            PlanError: fewer than two active times, or more than steps.
        """
        if not 2 <= self.active <= steps:
            raise PlanError(f"FlowBPBridge(active={self.active}) on {steps} steps: it lies in 2..{steps}.")
        j = 1 + uniform(steps - 1, generator)
        above = biased(range(j + 1, steps + 1), 1, generator)
        others = [t for t in range(1, steps + 1) if t != j and t not in above]
        active = above + biased(others, self.active - 2, generator) if self.active > 2 else above
        return flowbp_bridge(steps, j, active, self.alpha, self.sigmas)


@dataclass(frozen=True)
class FlowBPLagrange:
    """Draws FlowBP-Lagrange's k and j from a Dirichlet split of the trajectory: shares before k, between, after j.

    `alpha` and `scale` as in `flowbp_lagrange`. Its tau is 0.2, a setting of the objective.
    """

    alpha: float = 0.1
    scale: float = 0.25
    shares: tuple[float, float, float] = (2.5, 6.0, 2.0)

    weights_at = "all"
    """As LeapAlign: at every connected prediction."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps.

        Raises:
            PlanError: fewer than two steps.
        """
        k, j = split(self.shares, steps, generator)
        return Plan(*flowbp_lagrange(k, j, self.alpha, self.scale).outputs, steps=steps)
