"""The anchor: a penalty c * mean |v_theta(x_t) - v_base(x_t)|^2 at recorded latents, against drifting from the base
model.

For a stochastic sampler the KL divergence of two path measures is an integral of such squares over t (Girsanov). Here
one t is drawn an iteration and the rollout is deterministic, so the penalty resembles the KL and does not bound it. x_t
is a constant; for n numbers in v the gradient is

    2 c / n * (dv_theta(x_t)/dtheta)^T (v_theta(x_t) - v_base(x_t)).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.training.distributed import sharding

_SEED = 2**42
"""Keeps these draws apart from those of training and evaluation."""


@contextmanager
def swapped(module: nn.Module, others: Sequence[Tensor]) -> Generator[None]:
    """Give what trains the values of `others` for the block.

    Both swap their values in place, with memory for one more tensor. Where `others` have another dtype, which a swap
    would round, they stay as they are, and a copy of what trains is held where they lie.

    No graph from before the block may be run in it, and no graph made in it may be run after it.

    Args:
        others: for each parameter that trains, a tensor like this rank's shard of it.
    """
    pairs = list(zip(_shards(module), others, strict=True))
    swap = all(shard.dtype == other.dtype for shard, other in pairs)
    weights = others if swap else [shard.to(other.device, copy=True) for shard, other in pairs]
    _give(module, others, swap)
    try:
        yield
    finally:
        _give(module, weights, swap)


@torch.no_grad()
def _give(module: nn.Module, values: Sequence[Tensor], swap: bool) -> None:
    for shard, value in zip(_shards(module), values, strict=True):
        before = shard.clone() if swap else None
        shard.copy_(value)
        if before is not None:
            value.copy_(before)


def _shards(module: nn.Module) -> list[Tensor]:
    sharding.release(module)  # a module whose weights are gathered has others
    return [sharding.local(p.detach()) for p in module.parameters() if p.requires_grad]


class Anchor:
    """The base model's values of what trains (weights, or adapters that add nothing yet), kept on the CPU.

    Args:
        module: what trains, before training.
        coefficient: c, at least 0.
        seed: the run's.
    """

    def __init__(self, module: nn.Module, coefficient: float, seed: int) -> None:
        self.module, self.coefficient, self.seed = module, coefficient, seed
        self.base = [shard.to("cpu", copy=True) for shard in _shards(module)]

    def time(self, iteration: int, steps: int) -> int:
        """Draw t of an iteration, uniform in 1..T; the same for all its rollouts."""
        generator = torch.Generator().manual_seed(_SEED + self.seed * 1_000_003 + iteration)
        return 1 + int(torch.randint(steps, (), generator=generator))

    def add_gradient(
        self, field: Callable[[Tensor, Tensor], Tensor], trajectory: Trajectory, iteration: int, share: float = 1.0
    ) -> Tensor:
        """Add `share` times the penalty's gradient to `.grad`; return the mean square, 0-dim, without c and share.

        No graph through the parameters may be waiting for its backward pass.
        """
        t = self.time(iteration, trajectory.steps)
        x, sigma = trajectory[t], trajectory.sigma(t)
        with swapped(self.module, self.base), torch.no_grad():
            base = field(x, sigma)
        with torch.enable_grad():
            v = field(x, sigma)
            square = (v - base).to(torch.promote_types(v.dtype, torch.float32)).square().mean()
            torch.autograd.backward(self.coefficient * share * square)
        return square.detach()
