"""The gradient of a case in every way of running, its forward-mode tangent, and checks of its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from trajsurgery.plans.graph import exact, faithful, trained
from trajsurgery.plans.nodes import Velocity
from trajsurgery.surgery.api import apply, backward, values
from trajsurgery.surgery.parameters import Field
from trajsurgery.testing.frozen_reference import FrozenPlan
from trajsurgery.testing.proof_cases import Case, distance

Gradient = tuple[Tensor, ...]


def _outputs(case: Case, memory: Any = "retain", **other: Any) -> tuple[Tensor, ...]:
    """Return the plan's outputs; `other`: another trajectory or other fields than the case's."""
    arguments: dict[str, Any] = {"trajectory": case.trajectory, "field": case.fields, **other}
    return _as_tuple(apply(case.plan, memory=memory, params=case.params, **arguments))


def _applied(case: Case, cotangents: Gradient, memory: Any = "retain", **other: Any) -> Gradient:
    outputs = _outputs(case, memory, **other)
    return torch.autograd.grad(outputs, case.wrt, cotangents, allow_unused=True, materialize_grads=True)


def _checkpointed(case: Case, cotangents: Gradient) -> Gradient:
    fields = {name: partial(checkpoint, field, use_reentrant=False) for name, field in case.fields.items()}
    return _applied(case, cotangents, field=fields)


def _staged(case: Case, cotangents: Gradient) -> Gradient:
    return _into_grad(case, lambda: backward(case.plan, case.trajectory, case.fields, cotangents, params=case.params))


def _split(case: Case, cotangents: Gradient) -> Gradient:
    return _into_grad(case, lambda: torch.autograd.backward(_outputs(case, "split"), cotangents))


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


GRADIENTS: dict[str, Callable[[Case, Gradient], Gradient]] = {
    "retain": _applied,
    "recompute": partial(_applied, memory="recompute"),
    "staged": _staged,
    "split": _split,
    "checkpointed": _checkpointed,
}
"""Every way to get the gradient of `case.wrt`."""


def forward_mode(case: Case) -> Callable[[Sequence[Tensor]], Sequence[Tensor]] | None:
    """Return a function from directions of `case.wrt` to tangents of outputs; None for fields that are no Modules."""
    modules = {name: field for name, field in case.fields.items() if isinstance(field, nn.Module)}
    if len(modules) < len(case.fields):
        return None

    def push(direction: Sequence[Tensor]) -> Sequence[Tensor]:
        # attention's fused kernels have no forward-mode derivative
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = [forward_ad.make_dual(leaf, d) for leaf, d in zip(case.wrt, direction, strict=True)]
            by_id = {id(leaf): dual for leaf, dual in zip(case.params, duals, strict=False)}  # x_T may follow
            moved = {name: _called(module, by_id) for name, module in modules.items()}
            start = duals[-1] if len(duals) > len(case.params) else case.trajectory.start
            outputs = _outputs(case, trajectory=replace(case.trajectory, start=start), field=moved)
            tangents = [forward_ad.unpack_dual(output).tangent for output in outputs]
            return [torch.zeros_like(o) if t is None else t for o, t in zip(outputs, tangents, strict=True)]  # pyright: ignore[reportUnnecessaryComparison]

    return push


def _called(field: nn.Module, duals: Mapping[int, Tensor]) -> Field:
    theta = {name: duals[id(p)] for name, p in field.named_parameters(remove_duplicate=False) if id(p) in duals}
    return lambda x, sigma: functional_call(field, theta, (x, sigma), tie_weights=False)


def check_values(case: Case, tolerance: float) -> float:
    """Return how far the outputs are from their definition, and assert that they are within the tolerance.

    Recorded values are compared bit for bit, velocities that the field gives again within the tolerance.
    """
    seen: list[tuple[float, Tensor]] = []

    def watched(field: Field) -> Field:
        def call(x: Tensor, sigma: Tensor) -> Tensor:
            seen.append((float(sigma), x.detach()))
            return field(x, sigma)

        return call

    x = case.trajectory
    outputs = _outputs(case, field={name: watched(field) for name, field in case.fields.items()})
    others = {
        "recompute": _outputs(case, "recompute"),
        "values()": _as_tuple(values(case.plan, x, case.fields)),
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
    miss = distance(outputs, FrozenPlan(case).outputs)
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
        miss = distance([case.fields[call.field](x, sigma)], [case.trajectory.velocity(t)])
    assert miss <= tolerance, (
        f"the field misses the trajectory's velocity at t = {t} by {miss:.1e}: other weights made the rollout, or the "
        "field is random (dropout: call eval())."
    )


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
