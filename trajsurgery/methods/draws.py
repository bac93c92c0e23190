"""Random times."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def uniform(count: int, generator: torch.Generator | None) -> int:
    """An int in 0..count - 1."""
    return int(torch.randint(count, (), generator=generator).item())


def choose(among: Sequence[int], count: int, generator: torch.Generator | None) -> list[int]:
    """`count` distinct ones, every subset alike."""
    return [among[int(i)] for i in torch.randperm(len(among), generator=generator)[:count]]
