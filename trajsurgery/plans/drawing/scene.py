"""What a picture of a plan shows: marks in columns (times) and lanes, and the edges between them. No drawing here.

Lane 0 is the rollout; predictions and renoised samples sit in the lanes below, a lane further down wherever two would
overlap. Discounts, scales and stops are no marks of their own: they are written on the edge they act on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import networkx as nx

from trajsurgery.plans import nodes
from trajsurgery.plans.expression import START, Node, Time, walk
from trajsurgery.plans.graph import needs_gradient, reached
from trajsurgery.plans.step_gain import StepGain


@dataclass(frozen=True)
class Mark:
    """A latent, a model call or a recorded velocity."""

    kind: str
    """"real", "predicted", "call", "recorded", "reward", or "copy": a rollout's latent shown again beside its use."""
    column: Time
    lane: int
    name: str
    """LaTeX."""
    plain: str
    node: Node | int | None = None
    """Whose mark it is; None for the rollout's own, the number of a reward's output."""
    note: str = ""
    """A word beside it."""


@dataclass(frozen=True)
class Edge:
    """From mark to mark, in the direction of the values; a gradient runs against it."""

    kind: str
    """"straight", "input", "velocity", "connect", "renoise", "recover" or "reward"."""
    start: Mark
    end: Mark
    live: bool
    weight: float
    """The size of its coefficient, times its discounts, with t / T for sigma_t; a named factor counts 0.4."""
    notes: tuple[str, ...] = ()
    """LaTeX."""
    stopped: bool = False


@dataclass(frozen=True)
class Value:
    """What stands for a node: a mark, and what happens to the gradient on the way to it."""

    mark: Mark
    node: Node
    weight: float = 1.0
    notes: tuple[str, ...] = ()
    stopped: bool = False


class Scene:
    """The marks and edges of a plan."""

    def __init__(self, outputs: Sequence[Node], steps: int | None) -> None:
        self.columns = column_order(outputs, steps)
        self.steps = steps
        self.live = needs_gradient(outputs) & set(reached(outputs))
        self.trainable = needs_gradient(outputs)
        self.edges: list[Edge] = []
        self.values: dict[Node, Value] = {}
        self.marks: dict[Mark, None] = {}
        """In the order in which they came."""
        self.lit: set[Mark] = set()
        """The marks that a gradient reaches and that train something."""
        self.towards: dict[Mark, Mark] = {}
        """Where a velocity leads first."""
        self._taken: list[tuple[int, float, float, Mark]] = []
        self.real(self.columns[0])
        self.real(0)
        for node in walk(outputs):
            self.values[node] = PICTURES[type(node)](self, node)
        for i, output in enumerate(dict.fromkeys(outputs)):
            value = self.values[output]
            reward = self.add(Mark("reward", output.t, value.mark.lane, "r", "reward", i), True)
            self.edges.append(Edge("reward", value.mark, reward, True, value.weight, value.notes, value.stopped))

    def add(self, mark: Mark, lit: bool) -> Mark:
        """The mark, taken into the scene."""
        self.marks.setdefault(mark)
        if lit:
            self.lit.add(mark)
        return mark

    def real(self, t: Time, lit: bool = False) -> Mark:
        """The rollout's mark at t."""
        return self.add(Mark("real", t, 0, f"x_{{{t}}}", f"x_{t}"), lit)

    def predicted(self, node: Node, start: Mark, name: str, plain: str, note: str = "") -> Mark:
        """A mark below the rollout, in the first lane that is free between its start and itself; never back in one."""
        here, there = self.at(node.t), self.at(start.column)
        low, high = (there + 0.5, here + 0.25) if here > there else (here - 0.25, here + 0.6)
        lane = max(1, start.lane + (here <= there))
        while any(lane == taken and low < right and left < high and owner != start
                  for taken, left, right, owner in self._taken):  # fmt: skip
            lane += 1
        mark = self.add(Mark("predicted", node.t, lane, name, plain, node, note), node in self.live)
        self._taken.append((lane, low, high, mark))
        return mark

    def at(self, t: Time) -> int:
        """The index of a time's column."""
        return self.columns.index(t) if t in self.columns else 0

    def edge(self, kind: str, value: Value, end: Mark, consumer: Node, size: float = 1.0, note: str = "") -> None:
        """An edge into `end`, which stands for `consumer`."""
        live = consumer in self.live and value.node in self.trainable and not value.stopped and value.weight != 0
        notes = (*value.notes, note) if note else value.notes
        self.edges.append(Edge(kind, value.mark, end, live, value.weight * size, notes, value.stopped))

    def share(self, start: Time, to: Time) -> float:
        """(k - j) / T with numbers, 1 with names."""
        longest = self.steps or max((t for t in self.columns if isinstance(t, int)), default=1)
        return (start - to) / longest if isinstance(start, int) and isinstance(to, int) else 1.0


def column_order(outputs: Sequence[Node], steps: int | None) -> list[Time]:
    """The times of the plan from noise to image, with T first and 0 last; named ones as its leaps order them."""
    first: Time = START if steps is None else steps

    def column(t: Time) -> Time:
        return first if t == START else t

    times = list(dict.fromkeys([first, *(column(node.t) for node in walk(outputs)), 0]))
    later = nx.DiGraph()
    later.add_nodes_from(times)
    later.add_edges_from(pairwise(sorted((t for t in times if isinstance(t, int)), reverse=True)))
    later.add_edges_from((first, t) for t in times if t != first)
    later.add_edges_from((t, 0) for t in times if t != 0)
    hops = [node for node in walk(outputs) if isinstance(node, nodes.Leap | nodes.Advance)]
    later.add_edges_from((column(hop.x.t), column(hop.to)) for hop in hops)
    try:
        return list(nx.lexicographical_topological_sort(later, key=times.index))
    except nx.NetworkXUnfeasible:  # names whose order is open until they are bound
        return [first, *(t for t in times if t not in (first, 0)), 0]


def _real(scene: Scene, node: nodes.Latent | nodes.Noise | nodes.Connect) -> Value:
    mark = scene.real(node.t, node in scene.live)
    for parent in node.parents:
        scene.edge("connect", scene.values[parent], mark, node)
    return Value(mark, node)


def _recorded(scene: Scene, node: nodes.Recorded) -> Value:
    return Value(scene.add(Mark("recorded", node.t, 0, f"v_{{{node.t}}}", f"v_{node.t} recorded", node), False), node)


def _call(scene: Scene, node: nodes.Velocity) -> Value:
    value = scene.values[node.x]
    name = r"v_\theta" if node.field is None else rf"v_{{\mathrm{{{node.field}}}}}"
    plain = ("v" if node.field is None else f"v.{node.field}") + f"({value.mark.plain})"
    mark = scene.add(Mark("call", node.t, value.mark.lane, name, plain, node), node in scene.live)
    scene.edge("input", value, mark, node)
    return Value(mark, node)


def _hop(scene: Scene, node: nodes.Leap | nodes.Advance) -> Value:
    x, velocities = scene.values[node.x], [scene.values[v] for v in node.parents[1:]]
    t, note = node.x.t, node.rule if isinstance(node, nodes.Advance) else ""
    mark = scene.predicted(node, x.mark, rf"\hat{{x}}_{{{node.to}|{t}}}", f"x^_{node.to}|{t}", note)
    if not any(_starts_at(scene, x, v) for v in velocities):
        scene.edge("straight", x, mark, node)
    for v in velocities:
        if isinstance(node, nodes.Leap):
            scene.towards.setdefault(v.mark, mark)
        scene.edge("velocity", v, mark, node, scene.share(t, node.to) / len(velocities))
    return Value(mark, node)


def _starts_at(scene: Scene, x: Value, v: Value) -> bool:
    """Whether the arrow through the call shows that the hop starts at x: nothing happens on the straight path."""
    idle = x.node not in scene.trainable and not x.stopped
    return idle and any((e.kind, e.start, e.end, e.stopped) == ("input", x.mark, v.mark, False) for e in scene.edges)


def _noised(scene: Scene, node: nodes.Renoise | nodes.Recover) -> Value:
    x, adds = scene.values[node.x], isinstance(node, nodes.Renoise)
    if adds:
        name, plain = rf"x_{{{node.t}}}^{{({node.draw})}}", f"x_{node.t}^({node.draw})"
    else:
        name, plain = rf"\hat{{x}}_{{0|{node.x.t}}}", f"x^_0|{node.x.t}"
    mark = scene.predicted(node, x.mark, name, plain)
    if adds and x.mark.kind == "real" and mark.lane > 1:  # an arrow from the rollout would cross the lanes between
        x = replace(x, mark=scene.add(replace(x.mark, kind="copy", lane=mark.lane, node=node), False))
    scene.edge(node.op, x, mark, node, note=rf"{'+' if adds else '-'}\,\epsilon_{{\mathrm{{{node.draw}}}}}")
    return Value(mark, node)


def _changed(scene: Scene, node: nodes.Discount | nodes.Scale | nodes.Detach | nodes.DetachVelocity) -> Value:
    value = replace(scene.values[node.parents[0]], node=node)
    if isinstance(node, nodes.Detach | nodes.DetachVelocity):
        return replace(value, stopped=True)
    if isinstance(node.a, str):
        size, note = 0.4, rf"\{node.a}" if node.a in ("alpha", "beta", "gamma") else rf"\mathrm{{{node.a}}}"
    elif isinstance(node.a, StepGain):
        size, note = 1.0, rf"\times {node.a}"
    else:
        size, note = node.a, rf"\alpha = {node.a:g}" if isinstance(node, nodes.Discount) else rf"\times {node.a:g}"
    return replace(value, weight=value.weight * size, notes=(*value.notes, note))


PICTURES: dict[type[Node], Callable[[Scene, Any], Value]] = {
    nodes.Latent: _real,
    nodes.Noise: _real,
    nodes.Recorded: _recorded,
    nodes.Velocity: _call,
    nodes.Leap: _hop,
    nodes.Advance: _hop,
    nodes.Connect: _real,
    nodes.Discount: _changed,
    nodes.Scale: _changed,
    nodes.Detach: _changed,
    nodes.DetachVelocity: _changed,
    nodes.Renoise: _noised,
    nodes.Recover: _noised,
}
"""How each primitive is shown."""
