"""LeapAlign (Liang et al., 2026): the reward gradient takes two leaps whose ends are the sampler's own latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import choose, uniform
from trajsurgery.node import Factor, Time
from trajsurgery.plan import Plan, latent


def leapalign(k: Time, j: Time, alpha: Factor = 0.3) -> Plan:
    """x_k -> (x^_j|k --> x_j) -> (x^_0|j --> x_0): LeapAlign, Eq. 4-9, Algorithm 1.

    Gradient (Eq. 10), k and j standing for their sigmas:

        - j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + alpha j (k - j) dv/dx_j dv(x_k)/dtheta

    No deviation from the paper.

    Args:
        k, j: times, T >= k > j >= 1, or names.
        alpha: the discount of the network's input at j, in [0, 1]; the leap's straight part keeps the full gradient.
    """
    return leaps((k, j), alpha)


def leaps(times: Sequence[Time], alpha: Factor = 0.3) -> Plan:
    """Any number of leaps, from times[0] over times[1], ... to 0, each connected, each input but the first discounted.

    Two are LeapAlign; one and three are the ablation of Fig. 4b.

    Raises:
        PlanError: no time.
    """
    if not times:
        raise PlanError("leaps received no time: it takes one for each leap, noisiest first, leaps((18, 7)).")
    first, *others = times
    x = latent(first)
    for i, to in enumerate([*others, 0]):
        x = x.leap(to, discount=alpha if i else None).connect()
    return Plan(x)


@dataclass(frozen=True)
class LeapAlign:
    """Draws LeapAlign's times: `leaps` distinct ones, uniform, once an iteration (Algorithm 1, line 7).

    Args:
        alpha: discount of nested gradients: 0.3 with HPSv2.1, 0.1 with PickScore and HPSv3 (appendix E).
        window: the range of the times as shares of T; (0, 1) is all of 1..T, (0, 0.5) the later half (Fig. 4e).
        leaps: how many leaps (Fig. 4b); 2 is the method.
        distance: k - j as a share of T, fixed (Fig. 4f); None draws both.
    """

    alpha: float = 0.3
    window: tuple[float, float] = (0.0, 1.0)
    leaps: int = 2
    distance: float | None = None

    weights_at = "all"
    """Trajectory-similarity weights at every connected prediction (Eq. 12)."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps.

        Raises:
            PlanError: the window is no part of (0, 1), or holds fewer times than leaps, or no pair at the distance.
        """
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise PlanError(
                f"LeapAlign(window={self.window}): a window is two shares of T, rising, in [0, 1]: (0, 0.5) is the "
                "later half of the steps."
            )
        low = max(1, 1 + round(self.window[0] * steps))
        allowed = range(low, round(self.window[1] * steps) + 1)
        if self.distance is not None:
            return self._apart(allowed, steps, generator)
        if len(allowed) < self.leaps:
            raise PlanError(
                f"LeapAlign(window={self.window}) leaves the times {list(allowed)} of {steps}, too few for "
                f"{self.leaps} leaps. Widen the window, or take more steps."
            )
        times = sorted(choose(allowed, self.leaps, generator), reverse=True)
        return Plan(*leaps(times, self.alpha).outputs, steps=steps)

    def _apart(self, allowed: range, steps: int, generator: torch.Generator | None) -> Plan:
        apart = round((self.distance or 0) * steps)
        firsts = [j for j in allowed if j + apart in allowed]
        if self.leaps != 2 or apart < 1 or not firsts:
            raise PlanError(
                f"LeapAlign(distance={self.distance}, leaps={self.leaps}) has no pair {apart} steps apart among the "
                f"times {list(allowed)} of {steps}: a distance is of two leaps, at least one step, inside the window."
            )
        j = firsts[uniform(len(firsts), generator)]
        return Plan(*leapalign(j + apart, j, self.alpha).outputs, steps=steps)
