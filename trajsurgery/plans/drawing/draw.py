"""Pictures of plans: the rollout on the upper rail, the surgery below it (as in LeapAlign's Fig. 2).

Red carries gradient, thicker where its coefficient is larger; grey carries none. Arrows point the way the values go,
and the gradient runs against them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from trajsurgery.errors import SurgeryError
from trajsurgery.plans.drawing.layout import LANE, Placing
from trajsurgery.plans.drawing.scene import Edge, Mark, Scene
from trajsurgery.plans.nodes import Node, Noise

LIVE, IDLE, GREY, RAIL, INK, PAPER = "#c8321f", "#a9b0b8", "#7d858d", "#3b5b7a", "#20262d", "#ffffff"
CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "math_fontfamily": "cm"}
_SHAPES = {
    "real": '(["{}"])',
    "predicted": '("{}")',
    "call": '{{{{"{}"}}}}',
    "recorded": '["{}"]',
    "reward": '[["{}"]]',
}
_DOTTED = ("connect", "renoise", "recover")


def draw(outputs: Sequence[Node], steps: int | None, path: Path) -> Path:
    """Draws a plan; the path's ending is the format: .svg, .png, .pdf, or .mmd (Mermaid text).

    The same plan gives the same bytes.

    Raises:
        SurgeryError: another ending.
    """
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise SurgeryError(f"draw received {path.name!r}: the ending is the format, one of {', '.join(WRITERS)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(Scene(outputs, steps), path)
    return path


def _image(scene: Scene, path: Path) -> None:
    import matplotlib as mpl

    # dates and random ids would make the same picture differ from run to run
    dates: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    with mpl.rc_context({"svg.hashsalt": "trajsurgery"}):
        figure = _Painter(Placing(scene)).figure
        figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.12, metadata=dates, facecolor=PAPER)


WRITERS: dict[str, Callable[[Scene, Path], object]] = {
    **dict.fromkeys((".svg", ".png", ".pdf"), _image),
    ".mmd": lambda scene, path: path.write_text(mermaid(scene)),
}


def weight_width(weight: float) -> float:
    """The width of an arrow that carries a gradient times `weight`, in points."""
    return 0.7 + 2.5 * min(1.0, weight)


class _Painter:
    """A scene on a matplotlib figure whose data units are inches."""

    def __init__(self, at: Placing) -> None:
        from matplotlib.figure import Figure

        self.at, self.scene = at, at.scene
        left, right, low, high = at.extent
        self.figure = Figure(figsize=(right - left, high - low))
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(left, right), ylim=(low, high), aspect="equal")
        self.axes.axis("off")
        self.patches: dict[Mark, Any] = {}
        self._rail()
        for mark in self.scene.marks:
            self._mark(mark)
        for edge in self.scene.edges:
            self._edge(edge)
        self._legend()

    def _rail(self) -> None:
        """The rollout: a line with a dot for every step that the plan leaves alone."""
        first, last = self.at.x(self.scene.columns[0]), self.at.x(0)
        self.axes.plot([first, last], [0, 0], color=RAIL, lw=1.3, zorder=1, solid_capstyle="round")
        for x in self.at.between():
            self.axes.plot([x], [0], "o", color=RAIL, ms=3, zorder=1)
        for label, y in (("rollout", 0.0), ("surgery", -LANE)):
            look: dict[str, Any] = {"fontsize": 9, "color": INK, "alpha": 0.65, "style": "italic"}
            self.axes.text(first - 0.42, y, label, ha="right", va="center", **look)

    def _mark(self, mark: Mark) -> None:
        from matplotlib.patches import Circle, FancyBboxPatch

        x, y = self.at.point(mark)
        width, height = self.at.size(mark)
        lit = mark in self.scene.lit
        edge = {"real": LIVE if lit else RAIL, "reward": INK, "copy": RAIL}.get(mark.kind, LIVE if lit else IDLE)
        fill = LIVE if mark.kind == "call" and lit else INK if mark.kind == "reward" else PAPER
        if mark.kind != "recorded" and width == height:
            patch: Any = Circle((x, y), width / 2)
        else:
            box = f"round,pad=0,rounding_size={0.02 if mark.kind == 'recorded' else height / 2}"
            patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=box)
        if not self.at.labelled(mark) and mark.kind != "recorded":
            fill = edge
        style = (0, (2, 1.5)) if mark.kind == "copy" else "-"
        patch.set(facecolor=fill, edgecolor=edge, linewidth=1.2, linestyle=style, zorder=4)
        self.patches[mark] = self.axes.add_patch(patch)
        if self.at.labelled(mark):
            ink = INK if mark.kind in ("real", "predicted", "copy") else GREY if edge == IDLE else edge
            look = {"color": ink if fill == PAPER else PAPER, "fontsize": 9.5 if mark.kind == "recorded" else 11}
            self.axes.text(x, y, f"${mark.name}$", zorder=5, **look, **CENTRED)
        if mark.note:
            self.axes.text(x, y - 0.3, mark.note, fontsize=8, color=GREY, style="italic", **CENTRED)

    def _edge(self, edge: Edge) -> None:
        from matplotlib.patches import FancyArrowPatch

        color = LIVE if edge.live else IDLE
        width = weight_width(edge.weight) if edge.live else 0.9
        style = {"connect": (0, (3, 2)), "renoise": (0, (1, 1.5)), "recover": (0, (1, 1.5))}.get(edge.kind, "-")
        arrow = FancyArrowPatch(
            self.at.point(edge.start),
            self.at.point(edge.end),
            patchA=self.patches[edge.start],
            patchB=self.patches[edge.end],
            connectionstyle="angle3,angleA=-90,angleB=0" if self.at.under(edge) else f"arc3,rad={self.at.bend(edge)}",
            arrowstyle="-|>,head_length=0.35,head_width=0.18",
            mutation_scale=9 + 1.8 * width,
            shrinkA=1,
            shrinkB=1.5,
            linewidth=width,
            linestyle=style,
            color=color,
            zorder=3 if edge.live else 2,
        )
        self.axes.add_patch(arrow)
        text = ", ".join([*(f"${note}$" for note in edge.notes), *(["sg"] if edge.stopped else [])])
        if text:
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0, "alpha": 0.9}
            look = {"color": color if edge.live else GREY, "fontsize": 9, "bbox": box}
            self.axes.text(*self.at.middle(edge), text, zorder=6, **look, **CENTRED)

    def _legend(self) -> None:
        from matplotlib.lines import Line2D

        edges, marks = self.scene.edges, self.scene.marks
        kinds = {edge.kind for edge in edges} | {mark.kind for mark in marks}
        calls = {mark in self.scene.lit for mark in marks if mark.kind == "call"}
        noise = any(isinstance(node, Noise) for node in self.scene.live)
        dot: dict[str, Any] = {"marker": "o", "ls": "", "ms": 8}
        line: dict[str, Any] = {"color": LIVE, "lw": 1.6}
        sg: dict[str, Any] = {**dot, "color": GREY, "marker": r"$\mathrm{sg}$", "ms": 11, "mew": 0}
        notes = "".join(note for edge in edges for note in edge.notes)
        weak = any(edge.live and edge.weight <= 0.6 for edge in edges)
        entries: list[tuple[bool, dict[str, Any], str]] = [
            (True, {"color": LIVE, "lw": weight_width(1)}, "gradient, coefficient 1" if weak else "carries gradient"),
            (weak, {"color": LIVE, "lw": weight_width(0.3)}, "0.3"),
            (any(not edge.live for edge in edges), {"color": IDLE, "lw": 1}, "no gradient"),
            (True in calls, {"color": LIVE, **dot}, "model call, trained"),
            (False in calls, {"color": IDLE, "mfc": PAPER, **dot}, "model call, not trained"),
            (noise, {"color": LIVE, "mfc": PAPER, **dot}, "noise, trained"),
            ("recorded" in kinds, {"color": IDLE, "mfc": PAPER, **dot, "marker": "s", "ms": 6}, "recorded velocity"),
            ("connect" in kinds, {**line, "ls": (0, (3, 2))}, "connector"),
            (bool(kinds & {"renoise", "recover"}), {**line, "ls": (0, (1, 1.5))}, "noise put on or off"),
            (r"\alpha" in notes, {"color": LIVE, **dot, "marker": r"$\alpha$"}, "gradient discounted"),
            (r"\times" in notes, {"color": LIVE, **dot, "marker": r"$\times$"}, "gradient scaled"),
            (any(edge.stopped for edge in edges), sg, "gradient stopped"),
        ]
        shown = [(Line2D([], [], **look), label) for used, look, label in entries if used]
        self.axes.legend(
            *zip(*shown, strict=True),
            loc="lower center",
            ncol=min(len(shown), max(2, int((self.at.x(0) + 2.5) / 1.75))),
            frameon=False,
            fontsize=8.5,
            handlelength=1.8,
            columnspacing=1.4,
            labelcolor=INK,
            borderaxespad=0.2,
        )


def mermaid(scene: Scene) -> str:
    """The text of a .mmd file: gradient-carrying arrows are red, stopped ones grey."""
    shown = [mark for mark in scene.marks if mark.kind != "copy"]
    name = {mark: f"n{i}" for i, mark in enumerate(shown)}
    name |= {mark: name[scene.real(mark.column)] for mark in scene.marks if mark.kind == "copy"}
    lines = ["flowchart LR"]
    lines += [f"  {name[mark]}{_SHAPES[mark.kind].format(_title(mark))}" for mark in shown]
    styles: list[str] = []
    for i, edge in enumerate(scene.edges):
        label = _label(edge)
        arrow = ("-.->" if edge.kind in _DOTTED else "-->") + (f'|"{label}"|' if label else "")
        lines.append(f"  {name[edge.start]} {arrow} {name[edge.end]}")
        width = f"{1 + 3 * min(1.0, edge.weight) if edge.live else 1:.1f}px"
        styles.append(f"  linkStyle {i} stroke:{LIVE if edge.live else IDLE},stroke-width:{width}")
    real = sorted((mark for mark in scene.marks if mark.kind == "real"), key=lambda mark: scene.at(mark.column))
    for i, (mark, after) in enumerate(pairwise(real), len(scene.edges)):
        lines.append(f"  {name[mark]} --- {name[after]}")
        styles.append(f"  linkStyle {i} stroke:{RAIL},stroke-width:1.5px")
    live = ",".join(name[mark] for mark in scene.marks if mark in scene.lit)
    lines += [*styles, f"  classDef live stroke:{LIVE},stroke-width:2px"]
    return "\n".join([*lines, *([f"  class {live} live"] if live else [])]) + "\n"


def _title(mark: Mark) -> str:
    return f"{mark.plain} ({mark.note})" if mark.note else mark.plain


def _label(edge: Edge) -> str:
    notes = [re.sub(r"\\mathrm|\\,|[\\{}]", "", note.replace(r"\times", "x")) for note in edge.notes]
    return ", ".join([*([edge.kind] if edge.kind in _DOTTED else []), *notes, *(["sg"] if edge.stopped else [])])
