"""Random times."""

from __future__ import annotations

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
