"""The public API as text, by griffe: `python -m tests.repository.public_api` writes public_api.txt anew.

A change of that file is a change for users: it needs a line in CHANGELOG.md, and a renamed name keeps working with a
warning for one minor version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import griffe

import trajsurgery

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).parent / "public_api.txt"

MODULES = {
    "trajsurgery.testing": trajsurgery.testing.__all__,
    "trajsurgery.tiny": trajsurgery.tiny.__all__,
    "trajsurgery.training.settings": (
        ["ModelSource", "Rollout", "Decoder", "Optimiser", "Trained", "Hardware", "Evaluation", "Guards", "Objective"]
    ),
    "trajsurgery.training.presets": ["presets", "sd3", "wan", "paper"],
    "trajsurgery.training.components": ["RunComponents", "load"],
    "trajsurgery.training.step_record": ["StepRecord"],
    "trajsurgery.rewards.contract": ["Reward"],
    "trajsurgery.rewards.mixtures": ["Weighted", "Relative"],
    "trajsurgery.rewards.remote": ["Remote", "serve"],
    "trajsurgery.runs.reports.html_report": ["write_report"],
    "trajsurgery.runs.reports.comparison_page": ["write_comparison"],
    "trajsurgery.runs.handover.forms": ["export"],
    "trajsurgery.cli": ["main"],
    "trajsurgery.cli.recipe_script": ["cli"],
}
"""Public names beside those of `trajsurgery` itself."""


def api() -> str:
    """Return a line for each public function, class, field and method, with parameters and defaults."""
    package: Any = griffe.load("trajsurgery", search_paths=[ROOT])
    places = [(f"trajsurgery.{trajsurgery._MODULE[name]}", name) for name in trajsurgery.__all__]
    places += [(module, name) for module, names in MODULES.items() for name in names]
    lines: list[str] = []
    for module, name in sorted(set(places)):
        shown = f"trajsurgery.{name}" if name in trajsurgery.__all__ else f"{module}.{name}"
        value = getattr(import_module(module), name)
        if getattr(value, "__module__", "").startswith("trajsurgery") and "<" not in getattr(
            value, "__qualname__", "<"
        ):
            lines += described(shown, package[f"{value.__module__}.{value.__qualname__}".removeprefix("trajsurgery.")])
        else:
            lines.append(f"{shown}({', '.join(signature(value).parameters)})" if callable(value) else f"{shown}: value")
    return "\n".join(lines) + "\n"


def described(name: str, member: Any) -> Iterator[str]:
    """Yield the lines of a function, a class or a value."""
    if member.is_function:
        yield f"{name}({', '.join(map(parameter, member.parameters))})"
    else:
        yield f"class {name}({', '.join(map(str, member.bases))})"
        for inner, part in sorted(member.members.items()):
            if part.is_alias or (inner.startswith("_") and inner != "__init__"):
                continue
            if part.is_function:
                yield from described(f"  .{inner}", part)
            else:
                default = "" if part.value is None else f" = {part.value}"
                yield f"  .{inner}: {part.annotation}{default}"


def parameter(part: Any) -> str:
    """Return a parameter with its kind and default, without its type."""
    stars = {"variadic positional": "*", "variadic keyword": "**"}
    kind = part.kind.value if part.kind else ""
    keyword = "keyword " if kind == "keyword-only" else ""
    default = "" if part.default is None or kind in stars else f"={part.default}"
    return f"{keyword}{stars.get(kind, '')}{part.name}{default}"


if __name__ == "__main__":
    SNAPSHOT.write_text(api())
    print(SNAPSHOT, file=sys.stderr)
