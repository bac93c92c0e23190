"""LeapAlign (Liang et al., 2026): the reward gradient takes two leaps whose ends are the sampler's own latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import Method, dirichlet_pair, distinct, midpoint_pair, uniform, window_times
from trajsurgery.plans.nodes import Factor, Time
from trajsurgery.plans.plan import Plan, latent

if TYPE_CHECKING:
    import torch

RewardAt = Literal["image", "prediction"]


def leapalign(k: Time, j: Time, alpha: Factor = 0.3) -> Plan:
    """x_k -> (x^_j|k --> x_j) -> (x^_0|j --> x_0): LeapAlign, Eq. 4-9, Algorithm 1.

    Gradient (Eq. 10), k and j standing for their sigmas:

        - j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + alpha j (k - j) dv/dx_j dv(x_k)/dtheta

    No deviation from the paper.

    Args:
        k: the start of the first leap, T >= k > j, or a name.
        j: the start of the second leap, j >= 1, or a name.
        alpha: the discount of the network's input at j, in [0, 1]; the leap's straight part keeps the full gradient.
    """
    return leaps((k, j), alpha)


def leaps(times: Sequence[Time], alpha: Factor = 0.3, reward_at: RewardAt = "image", straight: bool = True) -> Plan:
    """Any number of leaps, from times[0] over times[1], ... to 0, each connected, each input but the first discounted.

    Two are LeapAlign; one and three are the ablation of Fig. 4b. Gradient, with a_i the length of leap i in sigma and
    D_i = dv/dx where it starts, summed over all choices i_1 < ... < i_n of n >= 1 leaps, in the order they are taken:

        (-1)^n alpha^(n - 1) a_(i_n) D_(i_n) ... a_(i_2) D_(i_2) a_(i_1) dv_(i_1)/dtheta

    Straight parts carry it over the leaps left out; without them (Eq. 14) only unbroken runs to the last leap remain.

    Args:
        reward_at: "image" connects the last prediction to x_0, "prediction" leaves it as it is (Fig. 4c).
        straight: False stops the straight part of every leap but the first, so that earlier velocities are reached
            through dv/dx alone (Eq. 14).

    Raises:
        PlanError: no time; another word for `reward_at`.
    """
    if not times:
        raise PlanError("leaps received no time: it takes one for each leap, noisiest first, leaps((18, 7)).")
    if reward_at not in ("image", "prediction"):
        raise PlanError(f'leaps received reward_at={reward_at!r}: the reward looks at the "image" or the "prediction".')
    first, *others = times
    x = latent(first).leap([*others, 0][0])
    for to in [*others, 0][1:]:
        x = x.connect()
        x = x.leap(to, discount=alpha) if straight else x.detach().leap(to, velocity=x.discount(alpha).velocity())
    return Plan(x.connect() if reward_at == "image" else x)


@dataclass(frozen=True)
class LeapAlign(Method):
    """Draws LeapAlign's times: `leaps` distinct ones, uniform, once an iteration (Algorithm 1, line 7).

    Args:
        alpha: discount of nested gradients: 0.3 with HPSv2.1, 0.1 with PickScore and HPSv3 (appendix E).
        window: the range of the times as shares of T; (0, 1) is all of 1..T, (0, 0.5) the later half (Fig. 4e).
        leaps: how many leaps (Fig. 4b); 2 is the method.
        pairs: how two leaps' times are drawn: "uniform" over pairs; "midpoint", k uniform and j half way from it to 0;
            "midpoint-k", j uniform and k half way from it to T; "dirichlet", FlowBP-Lagrange's split. Uniform is the
            paper's, the others are FlowBP's.
        distance: k - j as a share of T, fixed (Fig. 4f); None draws both.
        reward_at: whether the reward looks at the image or at the last prediction (Fig. 4c).
        straight: False drops the single-step terms of earlier velocities (Eq. 14, appendix C).
    """

    alpha: float = 0.3
    window: tuple[float, float] = (0.0, 1.0)
    leaps: int = 2
    pairs: Literal["uniform", "midpoint", "midpoint-k", "dirichlet"] = "uniform"
    distance: float | None = None
    reward_at: RewardAt = "image"
    straight: bool = True

    weights_at = "all"
    """Trajectory-similarity weights at every prediction (Eq. 12); one that is the sampler's own step counts as tau."""

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        return leaps(self._times(steps, generator), self.alpha, self.reward_at, self.straight)

    def _times(self, steps: int, generator: torch.Generator | None) -> Sequence[int]:
        allowed = window_times(self.window, steps)
        if self.distance is not None:
            return self._apart(allowed, steps, generator)
        if self.pairs != "uniform":
            return self._pair(steps, generator)
        if not 1 <= self.leaps <= len(allowed):
            raise PlanError(
                f"LeapAlign(window={self.window}) leaves the times {list(allowed)} of {steps}, which allow 1 to "
                f"{len(allowed)} leaps, not {self.leaps}. Widen the window, or take more steps."
            )
        return sorted(distinct(allowed, self.leaps, generator), reverse=True)

    def _pair(self, steps: int, generator: torch.Generator | None) -> Sequence[int]:
        draws = {
            "midpoint": lambda: midpoint_pair(steps, "j", generator),
            "midpoint-k": lambda: midpoint_pair(steps, "k", generator),
            "dirichlet": lambda: dirichlet_pair((2.5, 6.0, 2.0), steps, generator),
        }
        if self.leaps != 2 or self.window != (0.0, 1.0) or self.pairs not in draws:
            raise PlanError(
                f"LeapAlign(pairs={self.pairs!r}, leaps={self.leaps}, window={self.window}) on {steps} steps: pairs is "
                f'"uniform", or one of {", ".join(draws)}, which are of two leaps over the whole trajectory.'
            )
        return draws[self.pairs]()

    def _apart(self, allowed: range, steps: int, generator: torch.Generator | None) -> Sequence[int]:
        apart = round((self.distance or 0) * steps)
        firsts = [j for j in allowed if j + apart in allowed]
        if self.leaps != 2 or apart < 1 or not firsts or self.pairs != "uniform":
            raise PlanError(
                f"LeapAlign(distance={self.distance}, leaps={self.leaps}) has no pair {apart} steps apart among the "
                f"times {list(allowed)} of {steps}: a distance is of two uniform leaps, at least one step, inside the "
                "window."
            )
        j = firsts[uniform(len(firsts), generator)]
        return j + apart, j
