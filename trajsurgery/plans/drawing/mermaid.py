"""A scene as a Mermaid flowchart: plain lines are the rollout, arrows the surgery."""

from __future__ import annotations

import re
from itertools import pairwise

from trajsurgery.plans.drawing.scene import Edge, Mark, Scene

_SHAPES = {
    "real": '(["{}"])',
    "predicted": '("{}")',
    "call": '{{{{"{}"}}}}',
    "recorded": '["{}"]',
    "reward": '[["{}"]]',
}
_DOTTED = ("connect", "renoise", "recover")


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
        styles.append(f"  linkStyle {i} stroke:{'#c8321f' if edge.live else '#a9b0b8'},stroke-width:{width}")
    real = sorted((mark for mark in scene.marks if mark.kind == "real"), key=lambda mark: scene.at(mark.column))
    for i, (mark, after) in enumerate(pairwise(real), len(scene.edges)):
        lines.append(f"  {name[mark]} --- {name[after]}")
        styles.append(f"  linkStyle {i} stroke:#3b5b7a,stroke-width:1.5px")
    live = ",".join(name[mark] for mark in scene.marks if mark in scene.lit)
    lines += [*styles, "  classDef live stroke:#c8321f,stroke-width:2px"]
    return "\n".join([*lines, *([f"  class {live} live"] if live else [])]) + "\n"


def _title(mark: Mark) -> str:
    return f"{mark.plain} ({mark.note})" if mark.note else mark.plain


def _label(edge: Edge) -> str:
    notes = [re.sub(r"\\mathrm|\\,|[\\{}]", "", note.replace(r"\times", "x")) for note in edge.notes]
    return ", ".join([*([edge.kind] if edge.kind in _DOTTED else []), *notes, *(["sg"] if edge.stopped else [])])
