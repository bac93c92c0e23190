"""What the methods share: their base class, and random draws of times."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from trajsurgery.errors import PlanError
from trajsurgery.plans.plan import Plan

if TYPE_CHECKING:
    import torch


class Method(ABC):
    """Base of the frozen dataclasses that draw a plan's times: a subclass holds settings and defines `_draw`."""

    weights_at: ClassVar[str] = "none"
    """Where trajectory similarity weights the loss if the objective does not say; Algorithm 1, line 40: w = 1."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps.

        Raises:
            PlanError: `steps` is no positive int, or the settings make no plan of so many steps.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                f"draw received steps={steps!r}: it is the sampler's number of steps, an int of at least 1, 25."
            )
        return Plan(*self._draw(steps, generator).outputs, steps=steps)

    @abstractmethod
    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan: ...


def window_times(window: tuple[float, float], steps: int) -> range:
    """Return the times of a window of the trajectory: shares of T, (0, 0.5) the later half.

    Raises:
        PlanError: the window is no part of [0, 1].
    """
    if not 0 <= window[0] < window[1] <= 1:
        raise PlanError(
            f"window={window}: it is two shares of T, rising, in [0, 1]; (0, 0.5) is the later half of the steps."
        )
    return range(max(1, 1 + round(window[0] * steps)), round(window[1] * steps) + 1)


def uniform(count: int, generator: torch.Generator | None) -> int:
    """Return an int in 0..count - 1."""
    import torch

    return int(torch.randint(count, (), generator=generator).item())


def late_time(last: int, steps: int, generator: torch.Generator | None) -> int:
    """Return an early-stop time, uniform among the last `last` steps: randint(1, m) of Algorithm 1, line 2.

    Raises:
        PlanError: `last` is below 1.
    """
    if last < 1:
        raise PlanError(f"last={last}: the early stop is drawn from the last steps, at least 1 of them.")
    return 1 + uniform(min(last, steps), generator)


def distinct(among: Sequence[int], count: int, generator: torch.Generator | None) -> list[int]:
    """Return `count` distinct items; every subset is equally likely."""
    import torch

    return [among[int(i)] for i in torch.randperm(len(among), generator=generator)[:count]]


def biased_distinct(among: Sequence[int], count: int, bias: float, generator: torch.Generator | None) -> list[int]:
    """Return `count` distinct items, drawn one by one with odds of the i-th (from 1) proportional to i^bias.

    With times in falling order, late ones are drawn more often.
    """
    if not count:
        return []
    import torch

    odds = torch.arange(1, len(among) + 1, dtype=torch.float64) ** bias
    return [among[int(i)] for i in torch.multinomial(odds, count, generator=generator)]


def midpoint_pair(steps: int, of: Literal["j", "k"], generator: torch.Generator | None) -> tuple[int, int]:
    """Return T >= k > j >= 1: one of them uniform, the other half way from it to the trajectory's end on its side.

    Args:
        of: the one that lies in the middle.

    Raises:
        PlanError: fewer than two steps.
    """
    _pairs(steps, 2)
    if of == "j":
        k = 2 + uniform(steps - 1, generator)
        return k, (k + 1) // 2
    j = 1 + uniform(steps - 1, generator)
    return steps - (steps - j) // 2, j


def dirichlet_pair(shares: Sequence[float], steps: int, generator: torch.Generator | None) -> tuple[int, int]:
    """Return T >= k > j >= 2: j - 1, k - j and T + 1 - k are a Dirichlet draw of `shares`, rounded, each at least 1.

    Raises:
        PlanError: fewer than three steps.
    """
    _pairs(steps, 3)
    seeded = random.Random(uniform(2**31, generator))  # torch has no public gamma draw that takes a generator
    parts = [seeded.gammavariate(share, 1.0) for share in shares]
    lengths = [round(steps * part / sum(parts)) for part in parts]
    lengths[parts.index(max(parts))] += steps - sum(lengths)
    lengths = [max(1, length) for length in lengths]
    lengths[lengths.index(max(lengths))] += steps - sum(lengths)
    return lengths[0] + lengths[1] + 1, lengths[0] + 1


def _pairs(steps: int, least: int) -> None:
    if steps < least:
        raise PlanError(f"such a pair of times needs at least {least} steps, received {steps}.")
