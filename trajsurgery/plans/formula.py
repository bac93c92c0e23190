"""An expansion as the paper writes it, text and LaTeX, and as a table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
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


def table(expansion: Any, norms: Sequence[float] | None = None) -> Table:
    """Coefficient, Jacobians, source and kind of each term listed; with norms, each one's and a bar of its size.

    Args:
        norms: one for each term listed.
    """
    listed, count = len(expansion.terms), expansion.count
    caption = f"{count} terms" if listed == count else f"{count} terms, {listed} of them listed"
    by = ["x_T" if noise else "theta" for noise in (False, True)
          if any(isinstance(term.calls[-1], Noise) == noise for term in expansion.terms)]  # fmt: skip
    title = ", ".join(f"dx_{t}/d{b}" for t in dict.fromkeys(output.t for output in expansion.outputs) for b in by)
    rows, printer = Table(title=title, caption=caption), Text(expansion)
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
        cells = [printer.coefficient(term), jacobians, source, term.kind]
        if norms is not None:
            cells += [f"{norms[i]:.3g}", "\u2588" * round(10 * norms[i] / largest) if largest else ""]
        rows.add_row(*([str(term.output)] if several else []), *cells, style=COLOURS.get(term.kind, DEEPER))
    return rows


class _Printer(Printer):
    """Writes an expansion; sums in the order of times, the noisier first: k - j, not -j + k."""

    head: str
    tail: str
    jacobian: str
    parameters: str
    """dv/dtheta."""
    theta: str
    start: str
    """x_T."""
    one: str

    def __init__(self, expansion: Any) -> None:
        super().__init__()
        self._expansion = expansion
        times = dict.fromkeys(node.t for node in walk(expansion.outputs))
        self._rank = {sympy.Symbol(t if isinstance(t, str) else f"sigma_{t}"): i for i, t in enumerate(times) if t != 0}

    def write(self, braces: bool = False) -> str:
        """The whole expansion, one line an output; x_T's on its own."""
        lines: list[str] = []
        for i, output in enumerate(self._expansion.outputs):
            of_output = [term for term in self._expansion.terms if term.output == i]
            for by in (self.theta, self.start):
                terms = [term for term in of_output if isinstance(term.calls[-1], Noise) == (by == self.start)]
                if terms or (by == self.theta and not of_output):
                    written = self._write_kinds(terms) if braces else self._write_terms(terms)
                    lines.append(self.head.format(t=output.t, by=by) + (written or "0"))
        count = self._expansion.count
        hidden = count - len(self._expansion.terms)
        return "\n".join(lines) + (self.tail.format(hidden=hidden, count=count) if hidden else "")

    def _write_kinds(self, terms: Sequence[Any]) -> str:
        groups = [(kind, list(group)) for kind, group in groupby(terms, key=lambda term: term.kind)]
        sums = [(self._write_terms(group), _label(kind, group)) for kind, group in groups]
        return " + ".join(rf"\underbrace{{{written}}}_{{\text{{{label}}}}}" for written, label in sums)

    def _write_terms(self, terms: Sequence[Any]) -> str:
        addends: list[tuple[bool, str]] = []
        for term in terms:
            negative, size = self.split_sign(term.coefficient)
            shown = "" if size == sympy.Integer(1) else self.doprint(size)
            parts = [f"({shown})" if size.is_Add else shown, *(self.jacobian.format(t=t) for t in term.jacobians)]
            if not isinstance(term.calls[-1], Noise):
                parts.append(self.parameters.format(t=term.source))
            addends.append((negative, " ".join(part for part in parts if part) or self.one))
        return _join(addends, "- ")

    def split_sign(self, coefficient: Any) -> tuple[bool, Any]:
        """Whether the coefficient is negative, and its size: factors k - j lead with the noisier time."""
        negative, factors = False, []
        for factor in sympy.Mul.make_args(coefficient):
            if factor.is_number:
                minus = bool(factor < 0)
            else:
                minus = bool(factor.is_Add and self._by_time(factor)[0].as_coeff_Mul()[0] < 0)
            negative ^= minus
            factors.append(-factor if minus else factor)
        # else 0.3 (k - j) would be multiplied out
        apart = len(factors) == 2 and factors[0].is_number and factors[0] != 1
        return negative, sympy.Mul(*factors, evaluate=not apart)

    def _by_time(self, expression: Any) -> list[Any]:
        def rank(term: Any) -> tuple[int, str]:
            return min((self._rank.get(s, len(self._rank)) for s in term.free_symbols), default=-1), str(term)

        return sorted(sympy.Add.make_args(expression), key=rank)

    def _print_Add(self, expr: Any, order: Any = None) -> str:  # noqa: N802  # sympy's name
        addends = [(bool(term.as_coeff_Mul()[0] < 0), term) for term in self._by_time(expr)]
        return _join([(minus, self._print(-term if minus else term)) for minus, term in addends], "-")


class Text(_Printer, StrPrinter):
    """`dx_0/dtheta = - j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + ...`: no stars, floats of six digits."""

    head = "dx_{t}/d{by} = "
    tail = " + {hidden} more terms ({count} in all)"
    jacobian = "dv/dx_{t}"
    parameters = "dv(x_{t})/dtheta"
    theta = "theta"
    start = "x_T"
    one = "1"

    def coefficient(self, term: Any) -> str:
        """A term's coefficient with its sign, as it stands in the text."""
        negative, size = self.split_sign(term.coefficient)
        written = self.doprint(size)
        return ("- " if negative else "") + (f"({written})" if size.is_Add else written)

    def _print_Float(self, expr: Any) -> str:  # noqa: N802  # sympy's name
        return f"{float(expr):.6g}"

    def _print_Mul(self, expr: Any) -> str:  # noqa: N802  # sympy's name
        if any(factor.is_Pow and factor.exp.is_negative for factor in expr.args):
            return super()._print_Mul(expr)
        parts = sorted(expr.args, key=lambda f: (not f.is_number, f.is_Add, str(f)))
        return " ".join(f"({self.doprint(f)})" if f.is_Add else self.doprint(f) for f in parts)


class Latex(_Printer, LatexPrinter):
    """The same in LaTeX."""

    head = r"\frac{{\partial x_{{{t}}}}}{{\partial{by}}} = "
    tail = r" + \cdots (+{hidden})"
    jacobian = r"\frac{{\partial v_\theta(x_{{{t}}})}}{{\partial x_{{{t}}}}}"
    parameters = r"\frac{{\partial v_\theta(x_{{{t}}})}}{{\partial\theta}}"
    theta = r"\theta"
    start = " x_{T}"
    one = "I"

    def _print_Float(self, expr: Any) -> str:  # noqa: N802  # sympy's name
        mantissa, _, exponent = f"{float(expr):.6g}".partition("e")
        return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa


def _join(addends: Sequence[tuple[bool, str]], minus: str) -> str:
    """A sum of sizes, each with whether it is negative; `minus` stands before the first one if it is."""
    written = "".join((" - " if negative else " + ") + size for negative, size in addends)
    return (minus if written.startswith(" - ") else "") + written[3:]


def _label(kind: str, terms: Sequence[Any]) -> str:
    if kind == "straight":
        return "straight path"
    plural = "s" if len(terms) > 1 else ""
    words = {"nested once": f"nested gradient{plural}", "single-step": f"single-step gradient{plural}"}.get(kind, kind)
    if kind != "single-step" or len(terms) > 3:
        return words
    *others, last = (f"${term.source}$" for term in reversed(terms))
    return f"{words} at {', '.join(others)}{' and ' if others else ''}{last}"
