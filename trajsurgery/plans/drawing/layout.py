"""Where the marks of a scene go, in inches: x by time, y by lane."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from trajsurgery.plans.drawing.scene import Edge, Mark, Scene
from trajsurgery.plans.nodes import Node, Time

LANE = 1.35
"""The distance of two lanes."""
DENSE = 0.95
"""Columns closer than this carry labels only where something happens."""


class Placing:
    """The geometry of a picture."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._x = dict(zip(scene.columns, self._positions(), strict=True))
        self.dense = min(b - a for a, b in pairwise(self._x.values())) < DENSE if len(self._x) > 1 else False
        self._named = set(self._roomy())

    def _positions(self) -> list[float]:
        """Gaps grow with the steps that they span, between a least and a largest one."""
        columns = self.scene.columns
        numbers = [t for t in columns if isinstance(t, int)]
        least = max(0.55, min(1.75, 15.0 / max(1, len(columns) - 1)))
        span = max(1, max(numbers, default=1))
        positions = [0.0]
        for a, b in pairwise(columns):
            steps = a - b if isinstance(a, int) and isinstance(b, int) else None
            gap = max(least, min(6.0, 7.0 * steps / span)) if steps and steps > 1 else least
            positions.append(positions[-1] + gap)
        return positions

    def x(self, t: Time) -> float:
        """A time's column."""
        return self._x.get(t, 0.0)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top."""
        lowest = min(self.point(mark)[1] - (0.15 if mark.note else 0) for mark in self.scene.marks)
        return -1.15, self.x(0) + 1.35, lowest - 0.75, 0.45

    def point(self, mark: Mark) -> tuple[float, float]:
        """A mark's middle."""
        x, y = self.x(mark.column), -LANE * mark.lane
        if mark.kind == "reward":
            return (x + 0.95, y) if mark.column == 0 else (x, y - 0.62)
        if mark.kind == "copy":
            return self.x(mark.node.t) - 0.95 if isinstance(mark.node, Node) else x, y
        if mark.kind not in ("call", "recorded"):
            return x, y
        towards = self.scene.towards.get(mark)
        if towards is None:  # a support of an advance, beside the arrows that leave its latent straight down
            after = [place for place in self._x.values() if place > x]
            return x + min(0.55, 0.35 * (min(after) - x) if after else 0.55), y - 0.45 * LANE
        end, low = self.x(towards.column), -LANE * towards.lane
        if mark.lane == towards.lane or mark.kind == "recorded":
            return (x + end) / 2, low - 0.42 * LANE
        return (x, y - 0.5 * LANE) if end - x < 1.1 else (x + 0.3 * (end - x), low + 0.12 * LANE)

    def size(self, mark: Mark) -> tuple[float, float]:
        """A mark's width and height."""
        if not self.labelled(mark):
            return 0.1, 0.1
        if mark.kind in ("call", "reward"):
            field = len(mark.plain.split("(")[0].partition(".")[2])
            return 0.36 + 0.07 * max(0, field - 1), 0.36
        letters = len(mark.plain.replace("^", "").replace("_", "").replace("(", "").replace(" recorded", ""))
        return max(0.38, 0.22 + 0.085 * letters), 0.34 if mark.kind != "recorded" else 0.26

    def labelled(self, mark: Mark) -> bool:
        """Whether a mark is large enough to carry its name."""
        shown = mark.kind == "reward" or (mark.kind == "call" and mark in self.scene.lit) or mark in self._named
        return shown or not self.dense

    def _roomy(self) -> Iterator[Mark]:
        """The latents that keep their names where columns are dense: the ends and the inputs of calls, with room."""
        calls = {e.start for e in self.scene.edges if e.kind == "input" and e.end in self.scene.lit}
        ends = (0, self.scene.columns[0])
        named = [m for m in self.scene.marks if m in calls or m.column in ends]
        placed: list[tuple[float, int]] = []
        for mark in sorted(named, key=lambda m: (m.column not in ends, self.x(m.column))):
            if all(lane != mark.lane or abs(x - self.x(mark.column)) > DENSE for x, lane in placed):
                placed.append((self.x(mark.column), mark.lane))
                yield mark

    def bend(self, edge: Edge) -> float:
        """The curvature of an edge, as matplotlib's arc3 takes it: positive bends down on the way right."""
        (x0, y0), (x1, y1) = self.point(edge.start), self.point(edge.end)
        if edge.kind == "input" and y1 < y0 and abs(x1 - x0) > 0.05:
            return 0.22
        if edge.kind == "velocity":
            return 0.12 if edge.start in self.scene.towards else 0.0  # straight from the supports of an advance
        if edge.kind == "renoise" and x1 < x0:
            return 0.04 if x0 - x1 > 3 else -0.12  # flat ones pass above what lies between, steep ones beside it
        return 0.0

    def under(self, edge: Edge) -> bool:
        """Whether an edge leaves straight down and arrives from the left, below the supports of an advance."""
        return edge.kind == "straight" and bool(edge.end.note) and edge.start.lane < edge.end.lane

    def middle(self, edge: Edge) -> tuple[float, float]:
        """Where an edge's notes go."""
        (x0, y0), (x1, y1) = self.point(edge.start), self.point(edge.end)
        rad = self.bend(edge)
        if edge.start.kind == "copy":
            return (x0 + x1) / 2, y0 + 0.2
        if abs(x1 - x0) + abs(y1 - y0) < 1.0:  # too short to be written on
            return min(x0, x1) - 0.02, (y0 + y1) / 2 - 0.12
        return (x0 + x1) / 2 + rad * (y1 - y0) / 2, (y0 + y1) / 2 - rad * (x1 - x0) / 2

    def between(self) -> Iterator[float]:
        """The steps of the rollout that no column stands for; three dots where their number is not known."""
        real = {mark.column for mark in self.scene.marks if mark.kind == "real"}
        yield from (self.x(t) for t in self.scene.columns if t not in real)
        for a, b in pairwise(self.scene.columns):
            count = a - b - 1 if isinstance(a, int) and isinstance(b, int) else 3
            for i in range(1, count + 1):
                yield self.x(a) + (self.x(b) - self.x(a)) * i / (count + 1)
