"""Proof of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trajsurgery.params import Field
from trajsurgery.plan import Plan
from trajsurgery.surgery import apply, backward
from trajsurgery.trajectory import Trajectory

Proof = tuple


def check_gradient(
    plan: Plan,
    trajectory: Trajectory,
    field: Field,
    cotangents: Sequence[Tensor] | None = None,
    tolerance: float = 1e-10,
) -> tuple[Tensor, ...]:
    """Asserts that every way of running the plan gives the gradient of its closed form, and returns that gradient.

    Args:
        field: a field with `parameters()`; their `.grad` is overwritten.
        cotangents: one for each output; random ones if left out.
        tolerance: relative to the norm of the whole gradient.
    """
    found = apply(plan, trajectory, field)
    outputs = found if isinstance(found, tuple) else (found,)
    seeded = torch.Generator().manual_seed(0)
    cotangents = cotangents or [torch.randn(o.shape, generator=seeded, dtype=o.dtype) for o in outputs]
    params = [p for p in field.parameters() if p.requires_grad]  # pyright: ignore[reportFunctionMemberAccess]
    expansion = plan.gradient(interpolant=trajectory.interpolant)
    closed = tuple(expansion.evaluate(trajectory, field, cotangents, params))
    ways: dict[str, Callable[[], Any]] = {
        "retain": lambda: torch.autograd.backward(outputs, cotangents),
        "recompute": lambda: torch.autograd.backward(_tuple(apply(plan, trajectory, field, "recompute")), cotangents),
        "staged": lambda: backward(plan, trajectory, field, cotangents),
    }
    for way, run in ways.items():
        for p in params:
            p.grad = torch.zeros_like(p)
        run()
        miss = [p.grad - g for p, g in zip(params, closed, strict=True) if p.grad is not None]
        distance, size = _norm(miss), max(_norm(closed), 1e-300)
        assert distance <= tolerance * size, f"{way} misses the closed form by {distance / size:.1e}:\n{plan}"
    return closed


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors]).norm())
