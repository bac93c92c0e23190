"""The anchor: c * mean |v_theta(x_t) - v_base(x_t)|^2 at recorded latents, a penalty on leaving the untuned model.

For a sampler with noise the divergence of two path measures (KL) is an integral of such squares over t (Girsanov); here
one t is drawn an iteration, and the rollout is without noise: it is KL-like, and no bound. x_t counts as a constant, so
that its gradient for n numbers in v is

    2 c / n * (dv_theta(x_t)/dtheta)^T (v_theta(x_t) - v_base(x_t)).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trajsurgery.surgery.trajectory import Trajectory

_SEED = 2**42
"""Its draws are apart from those of an iteration (train.generator) and of the evaluation (heldout)."""


@contextmanager
def exchanged(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> Generator[None]:
    """For the block, the parameters' values are the others' and the other way round, in place: one more tensor at most.

    No graph that was made before may go through it, and none that is made in it may outlive it.
    """
    _exchange(parameters, others)
    try:
        yield
    finally:
        _exchange(parameters, others)


@torch.no_grad()
def _exchange(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for parameter, other in zip(parameters, others, strict=True):
        held = parameter.detach().clone()
        parameter.copy_(other)
        other.copy_(held)


class Anchor:
    """What trains, as it was: whole weights, or adapters that add nothing yet. The rest of the model never changes.

    Args:
        parameters: what trains, untuned. A copy is kept, on the CPU.
        coefficient: c, at least 0.
        seed: the run's.
    """

    def __init__(self, parameters: Sequence[Tensor], coefficient: float, seed: int) -> None:
        self.parameters, self.coefficient, self.seed = tuple(parameters), coefficient, seed
        self.base = [p.detach().to("cpu", copy=True) for p in self.parameters]

    def time(self, iteration: int, steps: int) -> int:
        """t of an iteration, uniform in 1..T; the same for all its rollouts."""
        generator = torch.Generator().manual_seed(_SEED + self.seed * 1_000_003 + iteration)
        return 1 + int(torch.randint(steps, (), generator=generator))

    def pull(
        self, field: Callable[[Tensor, Tensor], Tensor], trajectory: Trajectory, iteration: int, share: float = 1.0
    ) -> Tensor:
        """Adds share times the gradient into `.grad`; the mean of the squares, 0-dim, without c and share.

        No graph through the parameters may be waiting for its backward pass.
        """
        t = self.time(iteration, trajectory.steps)
        x, sigma = trajectory[t], trajectory.sigma(t)
        with exchanged(self.parameters, self.base), torch.no_grad():
            base = field(x, sigma)
        with torch.enable_grad():
            v = field(x, sigma)
            square = (v - base).to(torch.promote_types(v.dtype, torch.float32)).square().mean()
            torch.autograd.backward(self.coefficient * share * square)
        return square.detach()
