"""The gradient of a case in every way of running, its forward-mode tangent, and checks of its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from trajsurgery.plans.graph import exact, faithful, trained
from trajsurgery.plans.nodes import Velocity
from trajsurgery.surgery.api import apply, backward
from trajsurgery.surgery.api import values as plain
from trajsurgery.surgery.parameters import Field, Fields, field_named
from trajsurgery.testing.frozen_reference import FrozenPlan
from trajsurgery.testing.proof_cases import Case, norm

Gradient = tuple[Tensor, ...]


def _applied(
    case: Case, cotangents: Sequence[Tensor], memory: Any = "retain", fields: Fields | None = None
) -> Gradient:
    outputs = as_tuple(apply(case.plan, case.trajectory, fields or case.fields, memory, params=case.params))
    gradients: Any = torch.autograd.grad(outputs, case.wrt, tuple(cotangents), allow_unused=True)
    return tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(case.wrt, gradients, strict=True))


def _staged(case: Case, cotangents: Sequence[Tensor]) -> Gradient:
    def run() -> None:
        backward(case.plan, case.trajectory, case.fields, list(cotangents), params=case.params)

    return _into_grad(case, run)


def _split(case: Case, cotangents: Sequence[Tensor]) -> Gradient:
    def run() -> None:
        outputs = as_tuple(apply(case.plan, case.trajectory, case.fields, "split", params=case.params))
        torch.autograd.backward(outputs, tuple(cotangents))

    return _into_grad(case, run)


def _into_grad(case: Case, run: Callable[[], None]) -> Gradient:
    """Return what `run` leaves in `.grad`, and restore it."""
    previous = [leaf.grad for leaf in case.wrt]
    for leaf in case.wrt:
        leaf.grad = None
    try:
        run()
        return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in case.wrt)
    finally:
        for leaf, grad in zip(case.wrt, previous, strict=True):
            leaf.grad = grad


def _checkpointed(case: Case, cotangents: Sequence[Tensor]) -> Gradient:
    def wrapped(field: Field) -> Field:
        return lambda x, sigma: checkpoint(field, x, sigma, use_reentrant=False)

    fields = case.fields
    inner: Any = {n: wrapped(f) for n, f in fields.items()} if isinstance(fields, Mapping) else wrapped(fields)
    return _applied(case, cotangents, "retain", inner)


GRADIENTS: dict[str, Callable[[Case, Sequence[Tensor]], Gradient]] = {
    "retain": _applied,
    "recompute": lambda case, cotangents: _applied(case, cotangents, "recompute"),
    "staged": _staged,
    "split": _split,
    "checkpointed": _checkpointed,
}
"""Every way to get the gradient of `case.wrt`."""


def forward_mode(case: Case) -> Callable[[Sequence[Tensor]], Sequence[Tensor]] | None:
    """Return a function from directions of `case.wrt` to tangents of outputs; None for fields that are no Modules."""
    fields = case.fields
    fields_by_name: dict[str | None, Any] = dict(fields) if isinstance(fields, Mapping) else {None: fields}
    if not all(isinstance(field, nn.Module) for field in fields_by_name.values()):
        return None

    def push(direction: Sequence[Tensor]) -> Sequence[Tensor]:
        # attention's fused kernels have no forward-mode derivative
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = [forward_ad.make_dual(leaf, d) for leaf, d in zip(case.wrt, direction, strict=True)]
            by_id = {id(leaf): dual for leaf, dual in zip(case.params, duals, strict=False)}  # x_T may follow
            moved = {name: _called(field, by_id) for name, field in fields_by_name.items()}
            trajectory = case.trajectory
            if len(duals) > len(case.params):
                trajectory = replace(trajectory, start=duals[-1])
            outputs = as_tuple(apply(case.plan, trajectory, moved, params=case.params))
            tangents = [forward_ad.unpack_dual(output).tangent for output in outputs]
            return [torch.zeros_like(o) if t is None else t for o, t in zip(outputs, tangents, strict=True)]  # pyright: ignore[reportUnnecessaryComparison]

    return push


def _called(field: nn.Module, duals: Mapping[int, Tensor]) -> Field:
    theta = {name: duals[id(p)] for name, p in field.named_parameters(remove_duplicate=False) if id(p) in duals}
    return lambda x, sigma: functional_call(field, theta, (x, sigma), tie_weights=False)


def check_values(case: Case, tolerance: float) -> float:
    """Return how far the outputs are from their definition; recorded values are compared bit for bit.

    Args:
        tolerance: for the outputs, and for the velocities that the field gives again.

    Raises:
        AssertionError: a value is wrong.
    """
    seen: list[tuple[float, Tensor]] = []

    def watched(field: Field) -> Field:
        def call(x: Tensor, sigma: Tensor) -> Tensor:
            seen.append((float(sigma), x.detach()))
            return field(x, sigma)

        return call

    fields, x = case.fields, case.trajectory
    watching: Any = {n: watched(f) for n, f in fields.items()} if isinstance(fields, Mapping) else watched(fields)
    outputs = as_tuple(apply(case.plan, x, watching, params=case.params))
    others = {
        "recompute": as_tuple(apply(case.plan, x, case.fields, "recompute", params=case.params)),
        "values()": as_tuple(plain(case.plan, x, case.fields)),
    }
    for name, outputs_of_way in others.items():
        for i, (a, b) in enumerate(zip(outputs_of_way, outputs, strict=True)):
            assert torch.equal(a, b), f"output {i} of {name} is not that of retain, bit for bit: {case.plan}"
    for i, (node, output) in enumerate(zip(case.plan.outputs, outputs, strict=True)):
        assert not exact([node]) or torch.equal(output, x[0]), f"output {i} is not the rollout's x_0: {case.plan}"
    for call in faithful(trained(case.plan.outputs), x.is_step):
        if isinstance(call, Velocity) and call in trained(case.plan.outputs):
            _on_the_rollout(case, call, seen, tolerance)
    if case.values_only:
        return 0.0
    defined = FrozenPlan(case).outputs
    miss = norm([a.double() - b.double() for a, b in zip(outputs, defined, strict=True)]) / max(norm(defined), 1e-300)
    assert miss <= tolerance, f"the outputs miss what their primitives define by {miss:.1e}: {case.plan}"
    return miss


def _on_the_rollout(case: Case, call: Velocity, seen: Sequence[tuple[float, Tensor]], tolerance: float) -> None:
    """Assert that a call on a recorded latent receives exactly its value and gives the recorded velocity."""
    t: Any = call.t
    x, sigma = case.trajectory[t], case.trajectory.sigma(t)
    inputs = [received for at, received in seen if at == float(sigma)]
    assert any(torch.equal(received, x) for received in inputs), (
        f"the call at t = {t} is not made on the rollout's x_{t}, bit for bit: a connector that rounds? {case.plan}"
    )
    with torch.no_grad():
        v, recorded = field_named(case.fields, call.field)(x, sigma), case.trajectory.velocity(t)
    miss = norm([v.double() - recorded.double()]) / max(norm([recorded]), 1e-300)
    assert miss <= tolerance, (
        f"the field misses the trajectory's velocity at t = {t} by {miss:.1e}: other weights made the rollout, or the "
        "field is random (dropout: call eval())."
    )


def rounding(case: Case) -> float:
    """Return the accuracy of eighth-order differences in the dtype of the latents."""
    return 1e3 * float(torch.finfo(case.trajectory[0].dtype).eps ** (8 / 9))


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Return one output or several as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
