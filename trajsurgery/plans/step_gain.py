"""A factor that hangs on the sampler's times: it makes up for velocities that carry no gradient (FlowBP)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trajsurgery.errors import PlanError
from trajsurgery.plans.interpolants import weights


@dataclass(frozen=True)
class StepGain:
    """g = 1 + rescale (sum of |w_t| over all times / sum of |w_t| over the active ones - 1), for `v.scale(g)`.

    w_t is the weight that `advance(to, velocities, rule)` from the first time gives the velocity at t; with "euler" and
    consecutive times it is the length of the sampler's step. A run computes g from its sampler's own times.

    Raises:
        PlanError: times that do not fall to above `to`, no active time among them, a rescale that is negative or not
            finite.
    """

    times: Sequence[int]
    """The times of all velocities, noisiest first."""
    active: Collection[int]
    """Those whose velocities carry gradient."""
    to: int = 0
    rule: str = "euler"
    """"euler" or "lagrange", as `advance`'s."""
    rescale: float = 1.0
    """0 leaves gradients as they are, 1 makes up for all velocities that are not active."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(self.times))
        object.__setattr__(self, "active", tuple(t for t in self.times if t in self.active))
        ends = (*self.times, self.to)
        falls = all(type(t) is int for t in ends) and all(a > b for a, b in pairwise(ends))
        if not falls or not self.active or self.rule not in ("euler", "lagrange"):
            raise PlanError(
                f"{self!r}: no active time among the times, or times that make no path. They are ints that fall and "
                'end above `to`, one at least is active, and the rule is "euler" or "lagrange".'
            )
        if not (isinstance(self.rescale, int | float) and 0 <= self.rescale < math.inf):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"{self!r}: rescale is a finite number of at least 0.")

    def value(self, sigma: Callable[[int], Any], rescale: Any = None) -> Any:
        """Return g, in the arithmetic of the times.

        Args:
            sigma: the time of each t.
            rescale: the setting, as a number of that arithmetic.
        """
        ws = weights(self.rule, [sigma(t) for t in self.times], sigma(self.times[0]), sigma(self.to))
        # a sampler's times are monotone, so its steps have one sign
        sizes = dict(zip(self.times, ws if self.rule == "euler" else map(abs, ws)))
        whole, part = sum(sizes.values()), sum(sizes[t] for t in self.active)
        if part == 0:
            raise PlanError(
                f"{self!r}: the active velocities have no weight at these times, so that no factor makes up."
            )
        return 1 + (self.rescale if rescale is None else rescale) * (whole / part - 1)

    def __str__(self) -> str:
        return "g"
