"""The times of a plan from left to right, noise to image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import networkx as nx

from trajsurgery.plans.nodes import START, Advance, Leap, Node, Time, walk


def column_order(outputs: Sequence[Node], steps: int | None) -> list[Time]:
    """The times that the plan names, with T first and 0 last; named ones as its leaps order them."""
    first: Time = START if steps is None else steps
    found = list(dict.fromkeys([first, *(first if t == START else t for t in _times(outputs)), 0]))
    numbers = sorted((t for t in found if isinstance(t, int)), reverse=True)
    later = nx.DiGraph()
    later.add_nodes_from(found)
    later.add_edges_from(pairwise(numbers))
    later.add_edges_from((first, t) for t in found if t != first)
    later.add_edges_from((t, 0) for t in found if t != 0)
    for node in walk(outputs):
        if isinstance(node, Leap | Advance):
            later.add_edge(first if node.x.t == START else node.x.t, first if node.to == START else node.to)
    rank = {t: i for i, t in enumerate(found)}
    try:
        return list(nx.lexicographical_topological_sort(later, key=lambda t: rank[t]))
    except nx.NetworkXUnfeasible:  # names whose order is open until they are bound
        return found[:1] + [t for t in found[1:] if t != 0] + [0]


def _times(outputs: Sequence[Node]) -> Iterator[Time]:
    for node in walk(outputs):
        yield node.t
