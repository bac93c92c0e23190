"""Random times."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from trajsurgery.errors import PlanError


def uniform(count: int, generator: torch.Generator | None) -> int:
    """An int in 0..count - 1."""
    return int(torch.randint(count, (), generator=generator).item())


def late(last: int, steps: int, generator: torch.Generator | None) -> int:
    """An early-stop time, uniform among the last `last` steps: randint(1, m) of Algorithm 1, line 2.

    Raises:
        PlanError: `last` is below 1.
    """
    if last < 1:
        raise PlanError(f"last={last}: the early stop is drawn from the last steps, at least 1 of them.")
    return 1 + uniform(min(last, steps), generator)


def choose(among: Sequence[int], count: int, generator: torch.Generator | None) -> list[int]:
    """`count` distinct ones, every subset alike."""
    return [among[int(i)] for i in torch.randperm(len(among), generator=generator)[:count]]


def biased(among: Sequence[int], count: int, generator: torch.Generator | None) -> list[int]:
    """`count` distinct times, drawn one by one; the chance of a time t among those left is proportional to 1 / t."""
    odds = torch.tensor([1.0 / t for t in among])
    return [among[int(i)] for i in torch.multinomial(odds, count, generator=generator)]


def split(shares: Sequence[float], steps: int, generator: torch.Generator | None) -> tuple[int, int]:
    """T >= k > j >= 1: the lengths T - k, k - j and j are a Dirichlet draw of `shares`, rounded.

    Raises:
        PlanError: fewer than two steps.
    """
    if steps < 2:
        raise PlanError(f"a pair of times needs at least two steps, received {steps}.")
    seeded = random.Random(uniform(2**31, generator))  # torch has no public gamma draw that takes a generator
    before, between, after = (seeded.gammavariate(share, 1.0) for share in shares)
    whole = before + between + after
    j = min(max(1, round(steps * after / whole)), steps - 1)
    return min(max(j + 1, round(steps * (after + between) / whole)), steps), j
