"""A linear field v = w x, for values by hand: x_{t-1} = x_t (1 + w (s_{t-1} - s_t))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajsurgery import Trajectory, rollout

SIGMAS = [1.0, 0.75, 0.5, 0.0]
W = 0.5
X3 = torch.tensor([[2.0, -4.0]], dtype=torch.float64)


class Counted:
    """v = w x; records the sigma of each call and whether its velocity requires a gradient."""

    def __init__(self, w: float = W) -> None:
        self.w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        self.times: list[float] = []
        self.graphs: list[bool] = []

    def parameters(self) -> list[Tensor]:
        return [self.w]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.times.append(float(sigma))
        v = self.w * x
        self.graphs.append(v.requires_grad)
        return v


def rolled(field: Any = None, **options: Any) -> Trajectory:
    return rollout(field or Counted(), X3, SIGMAS, **options)


X2, X1, X0 = 2 * 0.875, 2 * 0.875**2, 2 * 0.875**2 * 0.75
"""The first components of the rollout."""


def first(x: Any) -> float:
    return float(x.detach()[0, 0])
