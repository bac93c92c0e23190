"""The closed form of a plan's gradient.

Apart from velocity calls a plan is linear. So with L(y, c) the coefficient of the call c in the node y along paths that
pass through no other call, the gradient of an output is the sum over chains of calls c_1, ..., c_n of

    L(output, c_1) L(x of c_1, c_2) ... L(x of c_{n-1}, c_n) * dv/dx at c_1 ... dv/dx at c_{n-1} * dv/dtheta at c_n.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import sympy

from trajsurgery.errors import PlanError
from trajsurgery.plans import formula
from trajsurgery.plans.derivatives import TimeSymbols, derivative, simplify
from trajsurgery.plans.graph import passes_gradient
from trajsurgery.plans.interpolants import Interpolant
from trajsurgery.plans.nodes import Node, Noise, Time, Velocity, walk

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

    @property
    def kind(self) -> str:
        """The order in the paper's words: "single-step", "nested once", ...; "straight": x_T's, past all calls."""
        words = ("straight" if isinstance(self.calls[0], Noise) else "single-step", "nested once", "nested twice")
        return words[self.order] if self.order < len(words) else f"nested {self.order} times"


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
        return formula.Text(self).write()

    def latex(self, braces: bool = False) -> str:
        """The sum in LaTeX, one line an output; `braces` name the kinds of terms below them, as Eq. 8 does."""
        return formula.Latex(self).write(braces)

    def __rich__(self) -> Any:
        """A table of the terms: coefficient, Jacobians, source, kind."""
        return formula.table(self)

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
        if not hasattr(trajectory, "interpolant"):
            raise PlanError(
                f"evaluate received a {type(trajectory).__name__} for the trajectory: the order is (trajectory, field, "
                "cotangent)."
            )
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
        numeric = expand(self.outputs, sigmas, self.interpolant, len(self.terms))
        found = {(term.calls, term.output): term for term in numeric.terms}
        zeros = [Term(sympy.Integer(0), term.calls, term.output) for term in self.terms]
        return replace(numeric, terms=[found.get((zero.calls, zero.output), zero) for zero in zeros], count=self.count)


def expand(outputs: Sequence[Node], sigmas: Sequence[float] | None, interpolant: Interpolant, limit: int) -> Expansion:
    """Derives the closed form from the graph; see `Plan.gradient`."""
    chains = CallChains(outputs, TimeSymbols(sigmas), interpolant)
    return Expansion(list(islice(chains.terms(), limit)), chains.count, tuple(outputs), interpolant)


class CallChains:
    """The chains of calls of a plan: counted by dynamic programming over its DAG, and listed one by one."""

    def __init__(self, outputs: Sequence[Node], times: TimeSymbols, interpolant: Interpolant) -> None:
        self.outputs = outputs
        self._rank = {node: i for i, node in enumerate(walk(outputs))}
        self._weights = {
            node: derivative(node, times, interpolant)
            for node in self._rank
            if passes_gradient(node) and not isinstance(node, Velocity | Noise)
        }
        self._linear: dict[Node, Linear] = {}
        self.calls: dict[Node, frozenset[Node]] = {}
        """The calls that L(node) holds."""
        self.below: dict[Node, int] = {}
        """The number of chains that start in one of them."""
        for node in self._rank:
            self.calls[node], self.below[node] = self._counted(node)
        self.count = sum(self.below[output] for output in outputs)

    def _counted(self, node: Node) -> tuple[frozenset[Node], int]:
        if isinstance(node, Velocity | Noise):
            return frozenset([node]), 1 + (self.below[node.x] if isinstance(node, Velocity) else 0)
        found: frozenset[Node] = frozenset()
        count = 0
        for parent, weight in zip(node.parents, self._weights.get(node, ()), strict=False):
            if weight != 0 and (more := self.calls[parent]):
                if found & more:  # a call on two ways: they are merged, and may cancel
                    kept = self.linear(node)
                    return frozenset(kept), sum(self.below[call] for call in kept)
                found, count = found | more if found else more, count + self.below[parent]
        return found, count

    def linear(self, node: Node) -> Linear:
        """L(node), the calls made last first."""
        if node not in self._linear:
            found: dict[Node, list[Any]] = {}
            ways: list[tuple[Node, Any]] = [(node, 1)]
            while ways:
                at, coefficient = ways.pop()
                if isinstance(at, Velocity | Noise):
                    found.setdefault(at, []).append(coefficient)
                else:
                    weights = zip(at.parents, self._weights.get(at, ()), strict=False)
                    ways += [(parent, _multiply(coefficient, weight)) for parent, weight in weights if weight != 0]
            calls = sorted(found, key=lambda call: -self._rank[call])
            merged = {call: found[call][0] if len(found[call]) == 1 else simplify(sum(found[call])) for call in calls}
            self._linear[node] = {call: coefficient for call, coefficient in merged.items() if coefficient != 0}
        return self._linear[node]

    def terms(self) -> Iterator[Term]:
        """Every chain, shortest first."""
        chains = deque(Term(1, (), i) for i in range(len(self.outputs)))
        while chains:
            term = chains.popleft()
            starts = term.calls[-1].parents if term.calls else (self.outputs[term.output],)
            for node in starts:  # the last call's input: none if it is the noise
                for call, c in self.linear(node).items():
                    chains.append(Term(_multiply(term.coefficient, c), (*term.calls, call), term.output))
                    yield replace(chains[-1], coefficient=sympy.sympify(chains[-1].coefficient))


def _multiply(a: Any, b: Any) -> Any:
    """a b; most factors are 1, and sympy's multiplication is slow. 0.3 (k - j) stays a product."""
    if isinstance(a, int) and a == 1:
        return b
    if isinstance(b, int) and b == 1:
        return a
    if isinstance(a, sympy.Add) and sympy.sympify(b).is_number:
        a, b = b, a
    apart = isinstance(b, sympy.Add) and sympy.sympify(a).is_number
    return sympy.Mul(a, b, evaluate=False) if apart else a * b
