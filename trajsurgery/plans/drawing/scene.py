"""What a picture of a plan shows: marks in columns (times) and lanes, and the edges between them. No drawing here.

Lane 0 is the rollout; predictions and renoised samples sit in the lanes below, a lane further down wherever two would
overlap. Discounts, scales and stops are no marks of their own: they are written on the edge they act on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trajsurgery.plans.drawing.columns import column_order
from trajsurgery.plans.graph import needs_gradient, reached
from trajsurgery.plans.nodes import (
    Advance,
    Connect,
    Detach,
    DetachVelocity,
    Discount,
    Factor,
    Latent,
    Leap,
    Node,
    Noise,
    Recorded,
    Recover,
    Renoise,
    Scale,
    Time,
    Velocity,
    walk,
)


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
        self.noise = False
        """Whether x_T trains."""
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
        while any(
            lane == other and low < right and left < high and owner != start
            for other, left, right, owner in self._taken
        ):
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


def _real(scene: Scene, node: Latent | Noise) -> Value:
    scene.noise |= isinstance(node, Noise) and node in scene.live
    return Value(scene.real(node.t, isinstance(node, Noise) and node in scene.live), node)


def _recorded(scene: Scene, node: Recorded) -> Value:
    return Value(scene.add(Mark("recorded", node.t, 0, f"v_{{{node.t}}}", f"v_{node.t} recorded", node), False), node)


def _call(scene: Scene, node: Velocity) -> Value:
    value = scene.values[node.x]
    name = r"v_\theta" if node.field is None else rf"v_{{\mathrm{{{node.field}}}}}"
    plain = ("v" if node.field is None else f"v.{node.field}") + f"({value.mark.plain})"
    mark = scene.add(Mark("call", node.t, value.mark.lane, name, plain, node), node in scene.live)
    scene.edge("input", value, mark, node)
    return Value(mark, node)


def _leap(scene: Scene, node: Leap) -> Value:
    x, v = scene.values[node.x], scene.values[node.v]
    t = node.x.t
    mark = scene.predicted(node, x.mark, rf"\hat{{x}}_{{{node.to}|{t}}}", f"x^_{node.to}|{t}")
    if not _said(scene, x, v):
        scene.edge("straight", x, mark, node)
    scene.towards.setdefault(v.mark, mark)
    scene.edge("velocity", v, mark, node, scene.share(t, node.to))
    return Value(mark, node)


def _advance(scene: Scene, node: Advance) -> Value:
    x, t = scene.values[node.x], node.x.t
    mark = scene.predicted(node, x.mark, rf"\hat{{x}}_{{{node.to}|{t}}}", f"x^_{node.to}|{t}", node.rule)
    if not any(_said(scene, x, scene.values[v]) for v in node.velocities):
        scene.edge("straight", x, mark, node)
    for v in node.velocities:
        scene.edge("velocity", scene.values[v], mark, node, scene.share(t, node.to) / len(node.velocities))
    return Value(mark, node)


def _said(scene: Scene, x: Value, v: Value) -> bool:
    """Whether the arrow through the call says that the hop starts at x: nothing happens on the straight path."""
    idle = x.node not in scene.trainable and not x.stopped
    return idle and any(
        e.kind == "input" and e.end is v.mark and e.start is x.mark and not e.stopped for e in scene.edges
    )


def _connect(scene: Scene, node: Connect) -> Value:
    mark = scene.real(node.t, node in scene.live)
    scene.edge("connect", scene.values[node.x], mark, node)
    return Value(mark, node)


def _renoise(scene: Scene, node: Renoise) -> Value:
    x = scene.values[node.x]
    mark = scene.predicted(node, x.mark, rf"x_{{{node.to}}}^{{({node.draw})}}", f"x_{node.to}^({node.draw})")
    if x.mark.kind == "real" and mark.lane > 1:  # an arrow from the rollout would cross the lanes between
        x = replace(x, mark=scene.add(replace(x.mark, kind="copy", lane=mark.lane, node=node), False))
    scene.edge("renoise", x, mark, node, note=rf"+\,\epsilon_{{\mathrm{{{node.draw}}}}}")
    return Value(mark, node)


def _recover(scene: Scene, node: Recover) -> Value:
    x, t = scene.values[node.x], node.x.t
    mark = scene.predicted(node, x.mark, rf"\hat{{x}}_{{0|{t}}}", f"x^_0|{t}")
    scene.edge("recover", x, mark, node, note=rf"-\,\epsilon_{{\mathrm{{{node.draw}}}}}")
    return Value(mark, node)


def _factor(a: Factor, sign: str) -> tuple[float, str]:
    if isinstance(a, str):
        return 0.4, rf"\{a}" if a in ("alpha", "beta", "gamma") else rf"\mathrm{{{a}}}"
    return a, f"{sign} {a:g}"


def _weaker(scene: Scene, node: Discount | Scale) -> Value:
    value = scene.values[node.parents[0]]
    size, note = _factor(node.a, r"\alpha =" if isinstance(node, Discount) else r"\times")
    return replace(value, node=node, weight=value.weight * size, notes=(*value.notes, note))


def _stopped(scene: Scene, node: Detach | DetachVelocity) -> Value:
    return replace(scene.values[node.parents[0]], node=node, stopped=True)


PICTURES: dict[type[Node], Callable[[Scene, Any], Value]] = {
    Latent: _real,
    Noise: _real,
    Recorded: _recorded,
    Velocity: _call,
    Leap: _leap,
    Advance: _advance,
    Connect: _connect,
    Discount: _weaker,
    Scale: _weaker,
    Detach: _stopped,
    DetachVelocity: _stopped,
    Renoise: _renoise,
    Recover: _recover,
}
"""How each primitive is shown."""
