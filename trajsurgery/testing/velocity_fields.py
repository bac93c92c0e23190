"""Velocity fields whose trajectories bend: random MLPs, and the exact field of Gaussian images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trajsurgery.plans.interpolants import Interpolant, RectifiedFlow


class MLP(nn.Module):
    """A field with random weights that bends: a leap misses by the order of the latents. x is [batch, dim]."""

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

    v(x) = alpha' E[x_0 | x] + beta' E[x_1 | x]. Mean and spread, each [dim], are what trains. It needs beta > 0 or a
    spread > 0.
    """

    def __init__(self, mean: Tensor, spread: Tensor, interpolant: Interpolant | None = None) -> None:
        super().__init__()
        self.mean, self.spread = nn.Parameter(mean.clone()), nn.Parameter(spread.clone())
        self.interpolant = interpolant or RectifiedFlow()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        alpha, beta, image_rate, noise_rate = self.interpolant.shares(sigma, torch)
        miss = (x - alpha * self.mean) / (alpha**2 * self.spread**2 + beta**2)
        image, noise = self.mean + alpha * self.spread**2 * miss, beta * miss
        return image_rate * image + noise_rate * noise
