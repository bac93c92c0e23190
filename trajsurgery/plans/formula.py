"""An expansion as the paper writes it, text and LaTeX, and as a table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import sympy
from rich.table import Table
from sympy.printing.latex import LatexPrinter
from sympy.printing.printer import Printer
from sympy.printing.str import StrPrinter

from trajsurgery.plans.nodes import Noise, walk

COLOURS = {"single-step": "green", "straight": "green", "nested once": "yellow"}
DEEPER = "red"


def text(expansion: Any) -> str:
    """`dx_0/dtheta = - j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + ...`, one line an output; x_T's on its own."""
    return _written(expansion, _TEXT, False)


def latex(expansion: Any, braces: bool) -> str:
    """The same in LaTeX; `braces` name the kinds of terms, as below Eq. 8."""
    return _written(expansion, _LATEX, braces)


def coefficient(expansion: Any, term: Any) -> str:
    """A term's coefficient with its sign, as it stands in the text."""
    order = _noisiest_first(expansion)
    negative, size = _signed(term.coefficient, order)
    written = _TEXT.printer(order).doprint(size)
    return ("- " if negative else "") + (f"({written})" if size.is_Add else written)


def left_side(expansion: Any) -> str:
    """What is differentiated: `dx_0/dtheta`, and by x_T where it trains."""
    by = ["x_T" if noise else "theta" for noise in (False, True)
          if any(isinstance(term.calls[-1], Noise) == noise for term in expansion.terms)]  # fmt: skip
    return ", ".join(f"dx_{t}/d{b}" for t in dict.fromkeys(o.t for o in expansion.outputs) for b in by)


def table(expansion: Any, norms: Sequence[float] | None = None) -> Table:
    """Coefficient, Jacobians, source and kind of each term listed; with norms, each one's and a bar of its size.

    Args:
        norms: one for each term listed.
    """
    listed, count = len(expansion.terms), expansion.count
    caption = f"{count} terms" if listed == count else f"{count} terms, {listed} of them listed"
    rows = Table(title=left_side(expansion), caption=caption)
    several = len(expansion.outputs) > 1
    for name in (*(["output"] if several else []), "coefficient", "Jacobians", "source", "order"):
        rows.add_column(name, justify="right" if name == "coefficient" else "left")
    if norms is not None:
        rows.add_column("norm", justify="right")
        rows.add_column("")
    largest = max(norms or (), default=0.0)
    for i, term in enumerate(expansion.terms):
        source = "x_T" if isinstance(term.calls[-1], Noise) else f"dv(x_{term.source})/dtheta"
        jacobians = " ".join(f"dv/dx_{t}" for t in term.jacobians)
        cells = [coefficient(expansion, term), jacobians, source, term.kind]
        if norms is not None:
            cells += [f"{norms[i]:.3g}", "\u2588" * round(10 * norms[i] / largest) if largest else ""]
        rows.add_row(*([str(term.output)] if several else []), *cells, style=COLOURS.get(term.kind, DEEPER))
    return rows


@dataclass(frozen=True)
class _Form:
    """How one of the two writes."""

    printer: Any
    head: str
    tail: str
    jacobian: str
    parameters: str
    """dv/dtheta."""
    theta: str
    start: str
    """x_T."""
    one: str


def _written(expansion: Any, form: _Form, braces: bool) -> str:
    order = _noisiest_first(expansion)
    lines: list[str] = []
    for i, output in enumerate(expansion.outputs):
        ours = [term for term in expansion.terms if term.output == i]
        for by in (form.theta, form.start):
            terms = [term for term in ours if isinstance(term.calls[-1], Noise) == (by == form.start)]
            if terms or (by == form.theta and not ours):
                groups = _braced(terms) if braces else [("", terms)]
                written = " + ".join(_sum_of(group, label, form, order) for label, group in groups)
                lines.append(form.head.format(t=output.t, by=by) + (written or "0"))
    hidden = expansion.count - len(expansion.terms)
    more = form.tail.format(hidden=hidden, count=expansion.count) if hidden else ""
    return "\n".join(lines) + more


def _sum_of(terms: Sequence[Any], label: str, form: _Form, order: dict[Any, int]) -> str:
    pieces: list[str] = []
    for term in terms:
        negative, size = _signed(term.coefficient, order)
        shown = "" if size == sympy.Integer(1) else form.printer(order).doprint(size)
        parts = [f"({shown})" if size.is_Add else shown, *(form.jacobian.format(t=t) for t in term.jacobians)]
        if not isinstance(term.calls[-1], Noise):
            parts.append(form.parameters.format(t=term.source))
        body = " ".join(part for part in parts if part) or form.one
        pieces.append((" - " if negative else " + ") + body if pieces else ("- " if negative else "") + body)
    written = "".join(pieces)
    return rf"\underbrace{{{written}}}_{{\text{{{label}}}}}" if label else written


def _braced(terms: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """The terms by kind, each with its label."""
    groups = [(kind, list(group)) for kind, group in groupby(terms, key=lambda term: term.kind)]
    return [(_label(kind, group), group) for kind, group in groups]


def _label(kind: str, terms: Sequence[Any]) -> str:
    if kind == "straight":
        return "straight path"
    plural = "s" if len(terms) > 1 else ""
    words = {"nested once": f"nested gradient{plural}", "single-step": f"single-step gradient{plural}"}.get(kind, kind)
    if kind != "single-step" or len(terms) > 3:
        return words
    *others, last = (f"${term.source}$" for term in reversed(terms))
    return f"{words} at {', '.join(others)}{' and ' if others else ''}{last}"


def _noisiest_first(expansion: Any) -> dict[Any, int]:
    """The rank of each time's symbol: as in the paper, k comes before j in k - j."""
    times = dict.fromkeys(node.t for node in walk(expansion.outputs))
    return {sympy.Symbol(t if isinstance(t, str) else f"sigma_{t}"): i for i, t in enumerate(times) if t != 0}


def _signed(coefficient: Any, order: dict[Any, int]) -> tuple[bool, Any]:
    """Whether the coefficient is written with a minus, and what follows: factors k - j lead with the noisier time."""
    negative, factors = False, []
    for factor in sympy.Mul.make_args(coefficient):
        if factor.is_number:
            negative ^= bool(factor < 0)
            factors.append(abs(factor))
        elif factor.is_Add and _ordered(factor, order)[0].as_coeff_Mul()[0] < 0:
            negative ^= True
            factors.append(-factor)
        else:
            factors.append(factor)
    apart = len(factors) == 2 and factors[0].is_number and factors[0] != 1  # else 0.3 (k - j) would be multiplied out
    return negative, sympy.Mul(*factors, evaluate=not apart)


def _ordered(expression: Any, order: dict[Any, int]) -> list[Any]:
    def rank(term: Any) -> tuple[int, str]:
        return min((order.get(s, len(order)) for s in term.free_symbols), default=-1), str(term)

    return sorted(sympy.Add.make_args(expression), key=rank)


class _Times(Printer):
    """Sums in the order of times, the noisier first: k - j, not -j + k."""

    def __init__(self, order: dict[Any, int]) -> None:
        super().__init__()
        self._times = order

    def _print_Add(self, expr: Any, order: Any = None) -> str:  # noqa: N802  # sympy's name
        pieces: list[str] = []
        for term in _ordered(expr, self._times):
            minus = bool(term.as_coeff_Mul()[0] < 0)
            sign = (" - " if minus else " + ") if pieces else ("-" if minus else "")
            pieces.append(sign + self._print(-term if minus else term))
        return "".join(pieces)


class _StrTimes(_Times, StrPrinter):
    """Products without stars; floats with six digits."""

    def _print_Float(self, expr: Any) -> str:  # noqa: N802  # sympy's name
        return f"{float(expr):.6g}"

    def _print_Mul(self, expr: Any) -> str:  # noqa: N802  # sympy's name
        if any(factor.is_Pow and factor.exp.is_negative for factor in expr.args):
            return super()._print_Mul(expr)
        parts = sorted(expr.args, key=lambda f: (not f.is_number, f.is_Add, str(f)))
        return " ".join(f"({self.doprint(f)})" if f.is_Add else self.doprint(f) for f in parts)


class _LatexTimes(_Times, LatexPrinter):
    """The same in LaTeX."""

    def _print_Float(self, expr: Any) -> str:  # noqa: N802  # sympy's name
        mantissa, _, exponent = f"{float(expr):.6g}".partition("e")
        return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa


_TEXT = _Form(
    printer=_StrTimes,
    head="dx_{t}/d{by} = ",
    tail=" + {hidden} more terms ({count} in all)",
    jacobian="dv/dx_{t}",
    parameters="dv(x_{t})/dtheta",
    theta="theta",
    start="x_T",
    one="1",
)
_LATEX = _Form(
    printer=_LatexTimes,
    head=r"\frac{{\partial x_{{{t}}}}}{{\partial{by}}} = ",
    tail=r" + \cdots (+{hidden})",
    jacobian=r"\frac{{\partial v_\theta(x_{{{t}}})}}{{\partial x_{{{t}}}}}",
    parameters=r"\frac{{\partial v_\theta(x_{{{t}}})}}{{\partial\theta}}",
    theta=r"\theta",
    start=" x_{T}",
    one="I",
)
