"""The derivative of each primitive by its parents: in symbols, or a number where the sampler's times are given.

A named time is the symbol of its sigma, a bound one t is `sigma_t`. Where sigmas are given the arithmetic is Python's
floats', or sympy's exact numbers if all of them are rational (ints, `fractions.Fraction`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Rational
from typing import Any

import sympy

from trajsurgery.plans.expression import Factor
from trajsurgery.plans.interpolants import Interpolant, weights
from trajsurgery.plans.nodes import START, Advance, Connect, Discount, Leap, Node, Recover, Renoise, Scale, Time
from trajsurgery.plans.step_gain import StepGain

WRITTEN_OUT = 3
"""An advance over more supports than this keeps its weights as names, `QuadratureWeight`, until numbers are put in."""
SYMBOLS, ADDENDS = 8, 60
"""A coefficient with more is left as it is: factoring it would take minutes."""


class TimeSymbols:
    """The sigma of each time."""

    def __init__(self, sigmas: Sequence[Any] | None) -> None:
        exact = sigmas is not None and all(isinstance(sigma, Rational) for sigma in sigmas)
        self.xp: Any = sympy if sigmas is None or exact else math
        """The namespace of the arithmetic."""
        self.sigmas: list[Any] | None = None
        if sigmas is not None:
            self.sigmas = [sympy.Rational(int(s.numerator), int(s.denominator)) if exact else float(s) for s in sigmas]

    def __call__(self, t: Time) -> Any:
        if t == START and self.sigmas is not None:
            t = len(self.sigmas) - 1
        if isinstance(t, str):
            return sympy.Symbol(t)
        if self.sigmas is not None:
            return self.sigmas[len(self.sigmas) - 1 - t]
        return sympy.Integer(0) if t == 0 else sympy.Symbol(f"sigma_{t}")

    def factor(self, a: Factor) -> Any:
        """A discount or scale; among exact numbers it is the decimal that it is written as."""
        if isinstance(a, str):
            return sympy.Symbol(a)
        if isinstance(a, StepGain):
            rescale = self.factor(a.rescale)
            if self.sigmas is None and a.rule == "lagrange":
                return QuadratureGain(rescale, self(a.to), *(arg for t in a.times for arg in (self(t), t in a.active)))
            return a.value(self, rescale)
        if self.xp is math:
            return a
        if float(a).is_integer():
            return sympy.Integer(int(a))
        return sympy.Float(a) if self.sigmas is None else sympy.Rational(repr(a))


def derivative(node: Node, times: TimeSymbols, interpolant: Interpolant) -> list[Any]:
    """d(node)/d(parent) for each parent of a node that passes gradients on."""
    return [simplify(weight) for weight in _WEIGHTS[type(node)](node, times, interpolant)]


def simplify(coefficient: Any) -> Any:
    """Like terms merged, the result as a product; numbers as they are."""
    if isinstance(coefficient, int | float) or coefficient.is_number or coefficient.is_Symbol:
        return coefficient
    if len(coefficient.free_symbols) > SYMBOLS or len(coefficient.args) > ADDENDS:
        return coefficient
    return sympy.factor(coefficient)


class QuadratureWeight(sympy.Function):
    """The weight of one support of an advance over many: (its sigma, from, to, the sigmas of all supports).

    The integral from `from` to `to` of the Lagrange polynomial that is 1 at its sigma. Written out, its size doubles
    with each support; so it stands for itself, and is a number as soon as its arguments are.
    """

    @classmethod
    def eval(cls, *args: Any) -> Any:
        """The number, once there are only numbers."""
        if all(arg.is_number for arg in args):
            at, start, to, *supports = args
            return weights("lagrange", supports, start, to)[supports.index(at)]
        return None

    def _sympystr(self, printer: Any) -> str:
        at, start, to = (printer.doprint(arg) for arg in self.args[:3])
        return f"w[{at}: {start} -> {to}]"

    def _latex(self, printer: Any) -> str:
        at, start, to = (printer.doprint(arg) for arg in self.args[:3])
        return rf"w_{{{at}}}^{{{start} \to {to}}}"


class QuadratureGain(sympy.Function):
    """The value of a `StepGain` of the rule "lagrange": (its rescale, the sigma of `to`, and of each time its sigma and
    whether it is active).

    It stands for itself like `QuadratureWeight`.
    """

    @classmethod
    def eval(cls, *args: Any) -> Any:
        """The number, once there are only numbers."""
        rescale, to, *supports = args
        sigmas = [*supports[::2], to][::-1]  # of the times len(sigmas) - 1, ..., 0
        if not all(sigma.is_number for sigma in sigmas):
            return None
        times = tuple(range(len(sigmas) - 1, 0, -1))
        active = tuple(t for t, chosen in zip(times, supports[1::2], strict=True) if chosen)
        return StepGain(times, active, rule="lagrange").value(sigmas.__getitem__, rescale)

    def _sympystr(self, printer: Any) -> str:
        _, to, start, *_ = map(printer.doprint, self.args)
        return f"g[{start} -> {to}]"

    def _latex(self, printer: Any) -> str:
        _, to, start, *_ = map(printer.doprint, self.args)
        return rf"g^{{{start} \to {to}}}"


def _advance(node: Advance, times: TimeSymbols, interpolant: Interpolant) -> Sequence[Any]:
    order = list(node.velocities)
    ranks = {v: math.inf if v.t == START else v.t for v in order}
    if not any(isinstance(t, str) for t in ranks.values()):  # names still unbound stand in the order given
        order.sort(key=lambda v: ranks[v], reverse=True)
    supports, start, to = [times(v.t) for v in order], times(node.x.t), times(node.to)
    if times.sigmas is None and node.rule != "euler" and len(order) > WRITTEN_OUT:
        found: list[Any] = [QuadratureWeight(at, start, to, *supports) for at in supports]
    else:
        found = weights(node.rule, supports, start, to)
    ws = dict(zip(order, found, strict=True))
    return [1, *(ws[v] for v in node.velocities)]


_WEIGHTS: dict[type[Node], Callable[[Any, TimeSymbols, Interpolant], Sequence[Any]]] = {
    Leap: lambda node, times, interpolant: interpolant.leap(times(node.x.t), times(node.to), times.xp),
    Advance: _advance,
    Connect: lambda *_: [1],
    Discount: lambda node, times, _: [times.factor(node.a)],
    Scale: lambda node, times, _: [times.factor(node.a)],
    Renoise: lambda node, times, interpolant: [interpolant.alpha(times(node.to), times.xp)],
    Recover: lambda node, times, interpolant: [1 / interpolant.alpha(times(node.x.t), times.xp)],
}
"""d(node)/d(parent) of each primitive that passes gradients on."""
