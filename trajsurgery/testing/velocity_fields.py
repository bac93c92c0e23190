"""Velocity fields whose trajectories bend: random MLPs, and the exact field of Gaussian images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.plans.interpolants import Interpolant, RectifiedFlow


class MLP(nn.Module):
    """A random field that bends: one leap misses by the order of the latents. x is [batch, dim].

    Args:
        seed: of the weights.
    """

    def __init__(self, dim: int, hidden: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner = nn.Linear(dim + 1, hidden, dtype=dtype)
        self.outer = nn.Linear(hidden, dim, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        time = sigma.to(x.dtype).reshape(-1, 1).expand(len(x), 1)
        return self.outer(torch.tanh(self.inner(torch.cat([x, time], 1))))


class Gaussian(nn.Module):
    """The exact velocity of images distributed as N(mean, spread^2), for any interpolant: linear in x.

    v(x) = alpha' E[x_0 | x] + beta' E[x_1 | x], with both expectations in `images` and `noises`. Mean and spread,
    each [dim], are what trains. It needs beta > 0 or a spread > 0.
    """

    def __init__(self, mean: Tensor, spread: Tensor, interpolant: Interpolant | None = None) -> None:
        super().__init__()
        self.mean, self.spread = nn.Parameter(mean.clone()), nn.Parameter(spread.clone())
        self.interpolant = interpolant or RectifiedFlow()

    def images(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_sigma = x]."""
        alpha, _, gain = self._gain(sigma)
        return self.mean + gain * alpha * self.spread**2 * (x - alpha * self.mean)

    def noises(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_1 | x_sigma = x]."""
        alpha, beta, gain = self._gain(sigma)
        return gain * beta * (x - alpha * self.mean)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        rates = self.interpolant.alpha_rate(sigma, torch), self.interpolant.beta_rate(sigma, torch)
        return rates[0] * self.images(x, sigma) + rates[1] * self.noises(x, sigma)

    def _gain(self, sigma: Tensor) -> tuple[Any, Any, Tensor]:
        alpha, beta = self.interpolant.alpha(sigma, torch), self.interpolant.beta(sigma, torch)
        return alpha, beta, 1 / (alpha**2 * self.spread**2 + beta**2)
