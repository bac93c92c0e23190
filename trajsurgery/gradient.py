"""The closed form of a plan's gradient.

Apart from velocity calls a plan is linear. So with L(y, c) the coefficient of the call c in the node y along paths that
pass through no other call, the gradient of an output is the sum over chains of calls c_1, ..., c_n of

    L(output, c_1) L(x of c_1, c_2) ... L(x of c_{n-1}, c_n) * dv/dx at c_1 ... dv/dx at c_{n-1} * dv/dtheta at c_n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy

from trajsurgery import formula
from trajsurgery.errors import PlanError
from trajsurgery.graph import passes
from trajsurgery.interpolant import Interpolant, weights
from trajsurgery.node import (
    START,
    Advance,
    Connect,
    Discount,
    Leap,
    Node,
    Noise,
    Recover,
    Renoise,
    Scale,
    Time,
    Velocity,
    walk,
)

Linear = dict[Node, Any]
"""{call or noise: its coefficient}."""


@dataclass(frozen=True)
class Term:
    """One chain of calls: coefficient * dv/dx ... dv/dx * dv/dtheta."""

    coefficient: Any
    """A sympy expression in the sigmas of the times and in named factors."""
    calls: tuple[Node, ...]
    """The calls of the chain, output side first; the last is the source."""
    output: int = 0
    """Which of the plan's outputs."""

    @property
    def jacobians(self) -> tuple[Time, ...]:
        """The times of the factors dv/dx, output side first."""
        return tuple(call.t for call in self.calls[:-1])

    @property
    def source(self) -> Time:
        """The time of the factor dv/dtheta (of x_T, if the source is `noise()`)."""
        return self.calls[-1].t

    @property
    def order(self) -> int:
        """How often the term is nested: 0 for a single-step term, 1 for one factor dv/dx, ..."""
        return len(self.calls) - 1


@dataclass(frozen=True)
class Expansion:
    """d(output)/d(theta) as a sum of terms, by order of nesting, output side first."""

    terms: list[Term]
    """The terms, up to the limit that was asked for."""
    count: int
    """How many there are in all."""
    outputs: tuple[Node, ...]
    interpolant: Interpolant

    def __str__(self) -> str:
        return formula.text(self)

    def latex(self) -> str:
        """The sum in LaTeX, one line an output."""
        return formula.latex(self)

    def evaluate(self, trajectory: Any, field: Any, cotangent: Any, params: Any = None) -> Any:
        """The gradient on a trajectory: every term is evaluated by itself, with products of one call each.

        Args:
            trajectory: a `Trajectory` that the plan fits.
            field: as in `trajsurgery.apply`.
            cotangent: [batch, *latent], or one for each output.
            params: as in `trajsurgery.apply`.

        Returns:
            An `Evaluation`: a sequence of one gradient for each parameter, with `terms` and `norms`.

        Raises:
            PlanError: names are unbound, some terms are not listed, or the trajectory has another interpolant.
        """
        if self.interpolant != trajectory.interpolant:
            raise PlanError(
                f"an expansion for {self.interpolant} on a trajectory of {trajectory.interpolant}: ask for "
                "plan.gradient(interpolant=trajectory.interpolant)."
            )
        if self.count > len(self.terms):
            raise PlanError(
                f"{self.count} terms, {len(self.terms)} of them listed: ask for plan.gradient(limit={self.count})."
            )
        return trajectory.evaluate(self, field, cotangent, params)

    def numbers(self, sigmas: Sequence[float]) -> Expansion:
        """The same terms, one by one, with the sampler's times put in; some may be 0 there."""
        numeric = expand(self.outputs, len(sigmas) - 1, sigmas, self.interpolant, len(self.terms))
        found = {(term.calls, term.output): term for term in numeric.terms}
        zeros = [Term(sympy.Integer(0), term.calls, term.output) for term in self.terms]
        return replace(numeric, terms=[found.get((zero.calls, zero.output), zero) for zero in zeros], count=self.count)


def expand(
    outputs: Sequence[Node], steps: int | None, sigmas: Sequence[float] | None, interpolant: Interpolant, limit: int
) -> Expansion:
    """Derives the closed form from the graph; see `Plan.gradient`."""
    chains = Chains(outputs, _Times(steps, sigmas), interpolant)
    terms: list[Term] = []
    for term in chains.terms():
        if len(terms) == limit:
            break
        terms.append(term)
    return Expansion(terms, chains.count, tuple(outputs), interpolant)


class Chains:
    """The chains of calls of a plan, by dynamic programming over its DAG."""

    def __init__(self, outputs: Sequence[Node], times: _Times, interpolant: Interpolant) -> None:
        self.outputs = outputs
        self.linear: dict[Node, Linear] = {}
        rank = {node: i for i, node in enumerate(walk(outputs))}
        for node in rank:
            found = _linear(node, self.linear, times, interpolant)
            # output side first: the calls made last lead
            self.linear[node] = dict(sorted(found.items(), key=lambda item: -rank[item[0]]))
        self._below: dict[Node, int] = {}

    @cached_property
    def count(self) -> int:
        """The number of chains that end in an output."""
        for node in self.linear:
            if isinstance(node, Velocity | Noise):
                self._below[node] = 1 + sum(self._below[call] for call in self._next(node))
        return sum(self._below[call] for output in self.outputs for call in self.linear[output])

    def terms(self) -> Iterator[Term]:
        """Every chain, shortest first."""
        level = [Term(sympy.Integer(1), (), i) for i in range(len(self.outputs))]
        while level:
            longer: list[Term] = []
            for term in level:
                step = self._next(term.calls[-1]) if term.calls else self.linear[self.outputs[term.output]]
                longer += [Term(term.coefficient * c, (*term.calls, call), term.output) for call, c in step.items()]
            yield from longer
            level = longer

    def _next(self, call: Node) -> Linear:
        return self.linear[call.x] if isinstance(call, Velocity) else {}


class _Times:
    """The sigma of each time: a symbol, or a number where the sampler's sigmas are given."""

    def __init__(self, steps: int | None, sigmas: Sequence[float] | None) -> None:
        self.steps = len(sigmas) - 1 if sigmas is not None else steps
        self.sigmas = sigmas

    def __call__(self, t: Time) -> Any:
        if t == START and self.sigmas is not None:
            t = len(self.sigmas) - 1
        if isinstance(t, str):
            return sympy.Symbol(t)
        if self.sigmas is not None:
            return sympy.Float(float(self.sigmas[len(self.sigmas) - 1 - t]))
        return sympy.Integer(0) if t == 0 else sympy.Symbol(f"sigma_{t}")


def _linear(node: Node, of: dict[Node, Linear], times: _Times, interpolant: Interpolant) -> Linear:
    """The coefficients of the calls in a node, given its parents'."""
    if isinstance(node, Velocity | Noise):
        return {node: sympy.Integer(1)}
    if not passes(node):
        return {}
    found: Linear = {}
    for parent, weight in zip(node.parents, _WEIGHTS[type(node)](node, times, interpolant), strict=True):
        for call, coefficient in of[parent].items():
            found[call] = found.get(call, 0) + weight * coefficient
    tidy = {call: _tidy(c) for call, c in found.items()}
    return {call: c for call, c in tidy.items() if c != 0}


def _tidy(coefficient: Any) -> Any:
    """Like terms merged, the result as a product."""
    expression = sympy.sympify(coefficient)
    return expression if expression.is_number or len(expression.args) > 200 else sympy.factor(expression)


def _leap_weights(node: Leap, times: _Times, interpolant: Interpolant) -> Sequence[Any]:
    return interpolant.leap(times(node.x.t), times(node.to), sympy)


def _advance_weights(node: Advance, times: _Times, interpolant: Interpolant) -> Sequence[Any]:
    order = list(node.velocities)
    ranks = {v: math.inf if v.t == START else v.t for v in order}
    if not any(isinstance(t, str) for t in ranks.values()):  # names still unbound stand in the order given
        order.sort(key=lambda v: ranks[v], reverse=True)
    ws = dict(zip(order, weights(node.rule, [times(v.t) for v in order], times(node.x.t), times(node.to)), strict=True))
    return [1, *(ws[v] for v in node.velocities)]


def _factor(node: Discount | Scale, *_: Any) -> Sequence[Any]:
    if isinstance(node.a, str):
        return [sympy.Symbol(node.a)]
    return [sympy.Integer(int(node.a)) if float(node.a).is_integer() else sympy.Float(node.a)]


def _renoise_weights(node: Renoise, times: _Times, interpolant: Interpolant) -> Sequence[Any]:
    return [interpolant.alpha(times(node.to), sympy)]


def _recover_weights(node: Recover, times: _Times, interpolant: Interpolant) -> Sequence[Any]:
    return [1 / interpolant.alpha(times(node.x.t), sympy)]


_WEIGHTS: dict[type[Node], Callable[[Any, _Times, Interpolant], Sequence[Any]]] = {
    Leap: _leap_weights,
    Advance: _advance_weights,
    Connect: lambda *_: [1],
    Discount: _factor,
    Scale: _factor,
    Renoise: _renoise_weights,
    Recover: _recover_weights,
}
"""d(node)/d(parent) of each primitive that passes gradients on."""
