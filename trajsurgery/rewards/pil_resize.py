"""PIL's bicubic resize of bytes, bit for bit: fixed-point weights, each pass rounded and clipped."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

BITS = 22
"""Binary places of a weight."""


def resized_levels(levels: Tensor, height: int, width: int) -> Tensor:
    """Integers [batch 3 height width] in [0, 255] of integers [batch 3 h w], as floats of 64 bits: first the width.

    Products and sums stay below 2^53, so that nothing is rounded but where PIL does it.
    """
    across, down = (_weights(int(old), new).to(levels.device) for old, new in zip(levels.shape[:1:-1], (width, height)))
    if levels.shape[-1] != width:
        levels = _rounded(levels.double() @ across.T)
    if levels.shape[-2] != height:
        levels = _rounded(down @ levels.double())
    return levels


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + 2 ** (BITS - 1)) / 2**BITS).floor().clamp(0, 255)


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int) -> Tensor:
    """[new, old]: of each old pixel in each new one, times 2^22, rounded away from zero at halves."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    ratio = old / new
    wider = max(ratio, 1.0)
    for row in range(new):
        middle = (row + 0.5) * ratio
        first, last = max(int(middle - 2 * wider + 0.5), 0), min(int(middle + 2 * wider + 0.5), old)
        row_weights = [_bicubic((column - middle + 0.5) / wider) for column in range(first, last)]
        total = sum(row_weights)
        for column, weight in zip(range(first, last), row_weights):
            weights[row, column] = int(math.copysign(0.5, weight) + weight / total * 2**BITS)
    return weights


def _bicubic(x: float) -> float:
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0
