"""An expansion as the paper writes it: text and LaTeX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from sympy.printing.latex import LatexPrinter
from sympy.printing.str import StrPrinter

from trajsurgery.node import Noise, walk


def text(expansion: Any) -> str:
    """`dx_0/dtheta = - j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + ...`, one line an output."""
    return _written(expansion, _text_term, "dx_{t}/dtheta = ", "{hidden} more terms")


def latex(expansion: Any) -> str:
    """The same in LaTeX."""
    return _written(expansion, _latex_term, r"\frac{{\partial x_{{{t}}}}}{{\partial\theta}} = ", r"\cdots (+{hidden})")


def _written(expansion: Any, written: Callable[[Any, str, Any], str], head: str, tail: str) -> str:
    printer = _StrTimes if written is _text_term else _LatexTimes
    lines: list[str] = []
    for i, output in enumerate(expansion.outputs):
        terms = [term for term in expansion.terms if term.output == i]
        order = _noisiest_first(expansion)
        pieces: list[str] = []
        for term in terms:
            negative, size = _signed(term.coefficient, order)
            shown = "" if size == sympy.Integer(1) else printer(order).doprint(size)
            body = written(term, f"({shown})" if size.is_Add else shown, term.calls[-1])
            pieces.append((" - " if negative else " + ") + body if pieces else ("- " if negative else "") + body)
        lines.append(head.format(t=output.t) + ("".join(pieces) or "0"))
    hidden = expansion.count - len(expansion.terms)
    return "\n".join(lines) + (f" + {tail.format(hidden=hidden)}" if hidden else "")


def _text_term(term: Any, coefficient: str, source: Any) -> str:
    calls = [f"dv/dx_{t}" for t in term.jacobians]
    last = "dx_T/dx_T" if isinstance(source, Noise) else f"dv(x_{source.t})/dtheta"
    return " ".join(part for part in (coefficient, *calls, last) if part)


def _latex_term(term: Any, coefficient: str, source: Any) -> str:
    calls = [rf"\frac{{\partial v_\theta(x_{{{t}}})}}{{\partial x_{{{t}}}}}" for t in term.jacobians]
    last = rf"\frac{{\partial v_\theta(x_{{{source.t}}})}}{{\partial\theta}}"
    return " ".join(part for part in (coefficient, *calls, "I" if isinstance(source, Noise) else last) if part)


def _noisiest_first(expansion: Any) -> dict[Any, int]:
    """The rank of each time's symbol: as in the paper, k comes before j in k - j."""
    symbols = [
        sympy.Symbol(t if isinstance(t, str) else f"sigma_{t}")
        for t in (n.t for n in walk(expansion.outputs))
        if t != 0
    ]
    return {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}


def _signed(coefficient: Any, order: dict[Any, int]) -> tuple[bool, Any]:
    """Whether the coefficient is written with a minus, and what follows: factors k - j lead with the noisier time."""
    negative, factors = False, []
    for factor in sympy.Mul.make_args(coefficient):
        if factor.is_number:
            negative ^= bool(factor < 0)
            factors.append(abs(factor))
        elif factor.is_Add and _lead(factor, order).as_coeff_Mul()[0] < 0:
            negative ^= True
            factors.append(-factor)
        else:
            factors.append(factor)
    return negative, sympy.Mul(*factors)


def _lead(expression: Any, order: dict[Any, int]) -> Any:
    return _ordered(expression, order)[0]


def _ordered(expression: Any, order: dict[Any, int]) -> list[Any]:
    def rank(term: Any) -> tuple[int, str]:
        return min((order.get(s, len(order)) for s in term.free_symbols), default=-1), str(term)

    return sorted(sympy.Add.make_args(expression), key=rank)


def _sum(expression: Any, order: dict[Any, int], shown: Callable[[Any], str]) -> str:
    """A sum with its signs, the noisier times first: k - j, not -j + k."""
    pieces: list[str] = []
    for term in _ordered(expression, order):
        minus = bool(term.as_coeff_Mul()[0] < 0)
        sign = (" - " if minus else " + ") if pieces else ("-" if minus else "")
        pieces.append(sign + shown(-term if minus else term))
    return "".join(pieces)


class _StrTimes(StrPrinter):
    """Sums in the order of times; products without stars."""

    def __init__(self, order: dict[Any, int]) -> None:
        super().__init__()
        self._times = order

    def _print_Add(self, expr: Any, order: Any = None) -> str:  # noqa: N802  # sympy's name
        return _sum(expr, self._times, lambda term: self.parenthesize(term, 30))

    def _print_Mul(self, expr: Any) -> str:  # noqa: N802  # sympy's name
        if any(factor.is_Pow and factor.exp.is_negative for factor in expr.args):
            return super()._print_Mul(expr)
        parts = sorted(expr.args, key=lambda f: (not f.is_number, f.is_Add, str(f)))
        return " ".join(f"({self.doprint(f)})" if f.is_Add else self.doprint(f) for f in parts)


class _LatexTimes(LatexPrinter):
    """The same order of times in LaTeX."""

    def __init__(self, order: dict[Any, int]) -> None:
        super().__init__()
        self._times = order

    def _print_Add(self, expr: Any, order: Any = None) -> str:  # noqa: N802  # sympy's name
        return _sum(expr, self._times, self._print)
