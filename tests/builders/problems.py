"""Small problems: a field with its trajectory, and outputs and gradients of every way to run a plan on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajsurgery import Plan, Trajectory, apply, backward, rollout, sample

SIGMAS = (1.0, 0.9, 0.83, 0.7, 0.55, 0.41, 0.3, 0.12, 0.0)


@dataclass(frozen=True)
class Problem:
    """A field and a rollout of it; the noise requires a gradient."""

    field: Any
    noise: Tensor
    sigmas: Tensor
    trajectory: Trajectory

    @property
    def params(self) -> list[Tensor]:
        """The field's parameters."""
        return list(self.field.parameters())


def problem(
    field: Any, steps: int = 8, shape: Sequence[int] = (3, 4), interpolant: Any = None, seed: int = 0
) -> Problem:
    """A rollout over the last `steps` of SIGMAS, stretched to start at 1, from seeded noise in float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
    sigmas = torch.tensor(SIGMAS[-steps - 1 :], dtype=torch.float64)
    sigmas = sigmas / sigmas[0]
    return Problem(field, noise, sigmas, rollout(field, noise, sigmas, interpolant))


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One output or several, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def cotangents(values: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """A random cotangent for each output."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in values]


def seeded(seed: int = 5) -> torch.Generator:
    """A generator with this seed."""
    return torch.Generator().manual_seed(seed)


def grads(values: Sequence[Tensor], wrt: Sequence[Tensor], cs: Sequence[Tensor]) -> list[Tensor]:
    """Reverse-mode gradients; zeros where no output depends on the tensor."""
    live = [(o, c) for o, c in zip(values, cs, strict=True) if o.requires_grad]
    got = torch.autograd.grad([o for o, _ in live], wrt, [c for _, c in live], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wrt, got, strict=True)]


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The distance of two gradients relative to the norm of the second; absolute where that is 0."""
    actual, expected = [a.detach() for a in actual], [b.detach() for b in expected]
    miss = torch.stack([(a.double() - b.double()).norm() for a, b in zip(actual, expected, strict=True)]).norm()
    size = torch.stack([b.double().norm() for b in expected]).norm()
    return float(miss / size) if size > 0 else float(miss)


def _staged(plan: Plan, p: Problem, wrt: list[Tensor], fields: Any) -> tuple[list[Tensor], list[Tensor]]:
    for leaf in wrt:
        leaf.grad = None
    out = outputs(apply(plan, p.trajectory, fields, generator=seeded()))
    backward(plan, p.trajectory, fields, cotangents(out), generator=seeded())
    got = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in wrt]
    return list(out), got


def _applied(memory: str) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    def run(plan: Plan, p: Problem, wrt: list[Tensor], fields: Any) -> tuple[list[Tensor], list[Tensor]]:
        out = outputs(apply(plan, p.trajectory, fields, memory, generator=seeded()))
        return list(out), grads(out, wrt, cotangents(out))

    return run


def _sampled(memory: str) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    def run(plan: Plan, p: Problem, wrt: list[Tensor], fields: Any) -> tuple[list[Tensor], list[Tensor]]:
        got, _ = sample(plan, fields, p.noise, p.sigmas, p.trajectory.interpolant, memory=memory, generator=seeded())
        return list(outputs(got)), grads(outputs(got), wrt, cotangents(outputs(got)))

    return run


def _split(plan: Plan, p: Problem, wrt: list[Tensor], fields: Any) -> tuple[list[Tensor], list[Tensor]]:
    return _by_backward(outputs(apply(plan, p.trajectory, fields, "split", generator=seeded())), wrt)


def _sampled_split(plan: Plan, p: Problem, wrt: list[Tensor], fields: Any) -> tuple[list[Tensor], list[Tensor]]:
    out, _ = sample(plan, fields, p.noise, p.sigmas, p.trajectory.interpolant, memory="split", generator=seeded())
    return _by_backward(outputs(out), wrt)


def _by_backward(out: tuple[Tensor, ...], wrt: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients that `backward()` leaves in `.grad`."""
    for leaf in wrt:
        leaf.grad = None
    live = [(o, c) for o, c in zip(out, cotangents(out), strict=True) if o.requires_grad]
    torch.autograd.backward([o for o, _ in live], [c for _, c in live])
    return list(out), [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in wrt]


WAYS = {
    "retain": _applied("retain"),
    "recompute": _applied("recompute"),
    "staged": _staged,
    "split": _split,
    "sample split": _sampled_split,
    "sample retain": _sampled("retain"),
    "sample recompute": _sampled("recompute"),
}
"""Every way to run a plan: (plan, problem, leaves, fields) -> (outputs, gradients)."""
