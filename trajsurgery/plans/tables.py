"""An expansion as a table on a terminal: a row a term, with the paper's word for it, and norms if it was evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from trajsurgery.plans import formula
from trajsurgery.plans.nodes import Noise

COLOURS = {"single-step": "green", "straight": "green", "nested once": "yellow"}
DEEPER = "red"


def table(expansion: Any, norms: Sequence[float] | None = None) -> Table:
    """Coefficient, Jacobians, source and kind of each term listed; with norms, each one's and a bar of its size.

    Args:
        norms: one for each term listed.
    """
    listed, count = len(expansion.terms), expansion.count
    caption = f"{count} terms" if listed == count else f"{count} terms, {listed} of them listed"
    found = Table(title=formula.left_side(expansion), caption=caption)
    several = len(expansion.outputs) > 1
    for name in (*(["output"] if several else []), "coefficient", "Jacobians", "source", "order"):
        found.add_column(name, justify="right" if name == "coefficient" else "left")
    if norms is not None:
        found.add_column("norm", justify="right")
        found.add_column("")
    largest = max(norms or (), default=0.0)
    for i, term in enumerate(expansion.terms):
        source = "x_T" if isinstance(term.calls[-1], Noise) else f"dv(x_{term.source})/dtheta"
        jacobians = " ".join(f"dv/dx_{t}" for t in term.jacobians)
        cells = [formula.coefficient(expansion, term), jacobians, source, term.kind]
        if norms is not None:
            cells += [f"{norms[i]:.3g}", "\u2588" * round(10 * norms[i] / largest) if largest else ""]
        found.add_row(*([str(term.output)] if several else []), *cells, style=COLOURS.get(term.kind, DEEPER))
    return found
