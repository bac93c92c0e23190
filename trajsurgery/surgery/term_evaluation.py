"""The closed form of a plan's gradient, evaluated term by term on a trajectory.

Each term is a product of vector-Jacobian products of single model calls, made anew: no graph spans two calls. So it can
serve as a proof of what the execution of plans makes of autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import PlanError
from trajsurgery.plans.formula import table
from trajsurgery.plans.graph import faithful
from trajsurgery.plans.nodes import START, Node, Noise, Velocity, walk
from trajsurgery.surgery.node_values import node_value
from trajsurgery.surgery.parameters import Fields, Params, field_named, leaves_of_calls
from trajsurgery.surgery.validation import call_field


@dataclass(frozen=True, eq=False)
class Evaluation(Sequence[Tensor]):
    """A gradient by terms; as a sequence, the whole gradient: one tensor for each parameter."""

    gradient: tuple[Tensor, ...]
    """The sum of the terms, one tensor for each parameter."""
    terms: tuple[tuple[Tensor, ...], ...]
    """Each term's gradient, in the order of `Expansion.terms` (for a `noise()` term: the gradient of x_T alone)."""
    start: Tensor | None
    """The gradient of x_T, if the plan has `noise()`."""
    expansion: Any
    """The terms' coefficients at the trajectory's times."""

    @property
    def norms(self) -> tuple[float, ...]:
        """The Euclidean norm of each term: where the gradient comes from (Fig. 4a, Fig. 6)."""
        return tuple(_norm(term) for term in self.terms)

    @property
    def by_kind(self) -> dict[str, float]:
        """{"single-step": the norm of the sum of these terms, "nested once": ...}: the nested share of Fig. 6.

        Terms of x_T, which are no gradients of parameters, are left out.
        """
        sums: dict[str, tuple[Tensor, ...]] = {}
        for term, gradient in zip(self.expansion.terms, self.terms, strict=True):
            if not isinstance(term.calls[-1], Noise):
                sums[term.kind] = _add(sums[term.kind], gradient) if term.kind in sums else gradient
        return {kind: _norm(total) for kind, total in sums.items()}

    def __rich__(self) -> Any:
        """The table of the expansion, with norms."""
        return table(self.expansion, self.norms)

    def __getitem__(self, index: Any) -> Any:
        return self.gradient[index]

    def __len__(self) -> int:
        return len(self.gradient)


def _norm(gradient: Sequence[Tensor]) -> float:
    return math.hypot(*(float(g.norm()) for g in gradient))


def _add(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def evaluate(
    expansion: Any, trajectory: Any, fields: Fields, cotangents: Sequence[Tensor], params: Params
) -> Evaluation:
    """See `Expansion.evaluate`."""
    numeric = expansion.numbers([float(s) for s in trajectory.sigmas.tolist()])
    free = set().union(*(term.coefficient.free_symbols for term in numeric.terms))
    if free:
        raise PlanError(
            f"unbound names {sorted(map(str, free))}: bind them with plan.at(name=...) before plan.gradient()."
        )
    calls = _Calls(expansion.outputs, trajectory, fields)
    trained = leaves_of_calls(fields, [calls.bound[term.calls[-1]] for term in numeric.terms], trajectory, params)
    total, start = tuple(torch.zeros_like(p) for p in trained), None
    terms: list[tuple[Tensor, ...]] = []
    for term in numeric.terms:
        c = float(term.coefficient) * cotangents[term.output]
        for call in term.calls[:-1]:
            (c,) = calls.pull(call, c)
        if isinstance(term.calls[-1], Noise):
            start = c if start is None else start + c
            terms.append((c,))
        else:
            terms.append(calls.pull(term.calls[-1], c, trained))
            total = _add(total, terms[-1])
    return Evaluation(total, tuple(terms), start, numeric)


class _Calls:
    """A plan's model calls on a trajectory, and products with the Jacobians of each."""

    def __init__(self, outputs: Sequence[Node], trajectory: Any, fields: Fields) -> None:
        self.trajectory, self.fields = trajectory, fields
        self.bound: dict[Node, Any] = {}
        """The plan's nodes, with "T" as a number."""
        for node in walk(outputs):
            self.bound[node] = node.replace(self.bound, lambda _, value: trajectory.steps if value == START else value)
        self.faithful = faithful([*self.bound.values()], trajectory.is_step)
        self.values: dict[Node, Tensor] = {}

    def pull(self, call: Node, cotangent: Tensor, params: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """Return (dv/dtheta)^T c, one for each parameter, or without parameters (dv/dx)^T c."""
        node = self.bound[call]
        x = self._value(node.x).clone().requires_grad_()
        wrt = (x,) if params is None else params
        with torch.enable_grad():
            v = self._call(node, x)
        return torch.autograd.grad(v, wrt, cotangent, allow_unused=True, materialize_grads=True) if wrt else ()

    def _value(self, end: Node) -> Tensor:
        for node in walk([end]):
            if node not in self.values:
                with torch.no_grad():
                    self.values[node] = (
                        self._call(node, self.values[node.x])
                        if isinstance(node, Velocity)
                        else node_value(node, self.values, self.trajectory, node in self.faithful, None)
                    )
        return self.values[end].detach()

    def _call(self, call: Velocity, x: Tensor) -> Tensor:
        field, t = field_named(self.fields, call.field), call.t
        return call_field(field, x, self.trajectory.sigma(t), int(t), self.trajectory.velocities.get(t))
