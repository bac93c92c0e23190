"""The closed form of a plan's gradient, evaluated term by term on a trajectory.

It shares no code with the execution of plans: it computes values anew, and each term as a product of vector-Jacobian
products of single model calls. So it can serve as a proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from trajsurgery.errors import PlanError
from trajsurgery.plans.graph import faithful
from trajsurgery.plans.interpolants import weights
from trajsurgery.plans.nodes import (
    Advance,
    Connect,
    Detach,
    DetachVelocity,
    Discount,
    Latent,
    Leap,
    Node,
    Noise,
    Recorded,
    Recover,
    Renoise,
    Scale,
    Velocity,
    walk,
)
from trajsurgery.plans.tables import table
from trajsurgery.surgery.parameters import Fields, Params, field_named, leaves, trainable_only
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
        sums: dict[str, list[Tensor]] = {}
        for term, gradients in zip(self.expansion.terms, self.terms, strict=True):
            if not isinstance(term.calls[-1], Noise):
                sums_of_kind = sums.setdefault(term.kind, list(gradients))
                sums[term.kind] = (
                    sums_of_kind
                    if sums_of_kind[0] is gradients[0]
                    else [a + b for a, b in zip(sums_of_kind, gradients, strict=True)]
                )
        return {kind: _norm(total) for kind, total in sums.items()}

    def __rich__(self) -> Any:
        """The table of the expansion, with norms."""
        return table(self.expansion, self.norms)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self.gradient[index]

    def __len__(self) -> int:
        return len(self.gradient)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.gradient)


def _norm(gradient: Sequence[Tensor]) -> float:
    return math.hypot(*(float(g.norm()) for g in gradient))


def evaluate(expansion: Any, trajectory: Any, fields: Fields, cotangent: Any, params: Params) -> Evaluation:
    """See `Expansion.evaluate`."""
    numeric = expansion.numbers([float(s) for s in trajectory.sigmas.tolist()])
    free = set().union(*(term.coefficient.free_symbols for term in numeric.terms))
    if free:
        raise PlanError(
            f"unbound names {sorted(map(str, free))}: bind them with plan.at(name=...) before plan.gradient()."
        )
    walker = _Walk(trajectory, fields)
    trained = _trained(numeric, walker, params)
    cotangents = (cotangent,) if isinstance(cotangent, Tensor) else tuple(cotangent)
    total = [torch.zeros_like(p) for p in trained]
    start: Tensor | None = None
    terms: list[tuple[Tensor, ...]] = []
    for term in numeric.terms:
        c = float(term.coefficient) * cotangents[term.output]
        for call in term.calls[:-1]:
            c = walker.pull_latent(call, c)
        if isinstance(term.calls[-1], Noise):
            start = c if start is None else start + c
            terms.append((c,))
        else:
            terms.append(walker.pull_params(term.calls[-1], c, trained))
            total = [a + b for a, b in zip(total, terms[-1], strict=True)]
    return Evaluation(tuple(total), tuple(terms), start, numeric)


def _trained(expansion: Any, walker: _Walk, params: Params) -> tuple[Tensor, ...]:
    required = not any(isinstance(term.calls[-1], Noise) for term in expansion.terms)
    if params is not None:
        return trainable_only(params, required)
    parameters: dict[int, Tensor] = {}
    for call in dict.fromkeys(term.calls[-1] for term in expansion.terms):
        if isinstance(call, Velocity):
            field, x, sigma = walker.at(call)
            parameters.update((id(leaf), leaf) for leaf in leaves(field, x, sigma, required=required))
    return tuple(parameters.values())


class _Walk:
    """Values of nodes without gradient, and products with the Jacobians of single calls."""

    def __init__(self, trajectory: Any, fields: Fields) -> None:
        self.trajectory, self.fields = trajectory, fields
        self.values: dict[Node, Tensor] = {}

    def at(self, call: Velocity) -> tuple[Any, Tensor, Tensor]:
        """The field of a call, its input and its time."""
        for node in walk([call.x]):
            if node not in self.values:
                with torch.no_grad():
                    self.values[node] = self._value(node)
        return field_named(self.fields, call.field), self.values[call.x].detach(), self._sigma(call.t)

    def pull_latent(self, call: Any, cotangent: Tensor) -> Tensor:
        """(dv/dx)^T c."""
        x = self.at(call)[1].clone().requires_grad_()
        with torch.enable_grad():
            gradient = _allow_none(torch.autograd.grad(self._call(call, x), x, cotangent, allow_unused=True))[0]
        return torch.zeros_like(x) if gradient is None else gradient

    def pull_params(self, call: Any, cotangent: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(dv/dtheta)^T c."""
        if not params:
            return ()
        x = self.at(call)[1]
        with torch.enable_grad():
            gradients = _allow_none(torch.autograd.grad(self._call(call, x), params, cotangent, allow_unused=True))
        return tuple(torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True))

    def _call(self, call: Velocity, x: Tensor) -> Tensor:
        """The model at a call's time."""
        t = self._int(call.t)
        return call_field(field_named(self.fields, call.field), x, self._sigma(t), t, self.trajectory.velocities.get(t))

    def _sigma(self, t: Any) -> Tensor:
        return self.trajectory.sigma(self._int(t))

    def _int(self, t: Any) -> int:
        return self.trajectory.steps if t == "T" else t

    def _value(self, node: Node) -> Tensor:
        of, interpolant = self.values, self.trajectory.interpolant
        match node:
            case Latent() | Noise() | Connect():
                return self.trajectory[self._int(node.t)]
            case Recorded():
                return self.trajectory.velocity(self._int(node.t))
            case Discount() | Detach() | Scale() | DetachVelocity():
                return of[node.parents[0]]
            case Velocity():
                return self._call(node, of[node.x])
            case Leap() if faithful([node], self.trajectory.is_step).issuperset([node]):
                return self.trajectory[self._int(node.to)]
            case Leap():
                a, b = interpolant.leap(self._sigma(node.x.t), self._sigma(node.to), torch)
                return a * of[node.x] + b * of[node.v]
            case Advance():
                order = sorted(node.velocities, key=lambda v: -self._int(v.t))
                ws = weights(node.rule, [self._sigma(v.t) for v in order], self._sigma(node.x.t), self._sigma(node.to))
                return of[node.x] + sum(w * of[v] for w, v in zip(ws, order, strict=True))
            case Renoise():
                sigma, eps = self._sigma(node.to), self.trajectory.noise(node.draw, self._int(node.to))
                return interpolant.alpha(sigma, torch) * of[node.x] + interpolant.beta(sigma, torch) * eps
            case Recover():
                sigma = self._sigma(node.x.t)
                drawn = [self._int(up.to) for up in walk([node]) if isinstance(up, Renoise) and up.draw == node.draw]
                eps = self.trajectory.noise(node.draw, drawn[0] if drawn else self._int(node.x.t))
                return (of[node.x] - interpolant.beta(sigma, torch) * eps) / interpolant.alpha(sigma, torch)
            case _:
                raise AssertionError(node)


def _allow_none(gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad with allow_unused also returns None, which its stub does not say."""
    return gradients
