"""The study's Markdown: Table 2, gains, learning rates, findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.findings import Finding
from benchmarks.study.methods import GRID
from benchmarks.study.seed_statistics import CATEGORIES, NAMED


def table_2(found: Mapping[str, Any], costs: Mapping[str, Any]) -> str:
    """Table 2: means over seeds with the half-width of their 95% intervals."""
    columns = [*NAMED, *CATEGORIES]
    head = ["method", "rate", *NAMED.values(), *CATEGORIES, "s / it.", "MiB"]
    lines = [row(head), row(["---"] * len(head))]
    for name, line in found["summary"].items():
        chosen = found["rates"].get(name, {}).get("chosen")
        cells = [cell(line[column]["mean"], half_width(line[column]), column) for column in columns]
        cost = costs.get(name)
        spent = [f"{cost['seconds']['median']:.2f}", f"{cost['peak_bytes'] / 2**20:.0f}"] if cost else ["", ""]
        lines.append(row([name, f"{chosen:g}" if chosen else "", *cells, *spent]))
    return "\n".join(lines)


def gains_table(found: Mapping[str, Any]) -> str:
    """What each method gained over the base, image by image, with the half-width of the 95% interval over seeds."""
    columns = [*NAMED, *CATEGORIES, "junk", "diversity"]
    lines = [row(["gain", *(NAMED.get(c, c) for c in columns)]), row(["---"] * (len(columns) + 1))]
    for name, line in found["summary"].items():
        if name != "base":
            got = [line[column]["gain"] for column in columns]
            lines.append(row([name, *(cell(g["mean"], half_width(g), c, "+") for g, c in zip(got, columns))]))
    return "\n".join(lines)


def half_width(line: Mapping[str, Any]) -> float | None:
    """Half of the interval's width; None for a single seed."""
    return None if line["low"] is None else (line["high"] - line["low"]) / 2


def cell(mean: float, width: float | None, figure: str, sign: str = "") -> str:
    """A figure with its interval; shares with three digits, scores with four."""
    digits = 3 if figure in ("rules", *CATEGORIES) else 4
    beside = "" if width is None else f" ±{width:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{beside}"


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rates_table(rates: Mapping[str, Any]) -> str:
    """How the rates were chosen: the validation reward of each that was tried, and what the rules would have chosen."""
    tried = sorted({float(rate) for of in rates.values() for rate in of.get("tried", {})})
    if not tried:
        return "The rates were given, not chosen here."
    lines = [
        row(["method", *(f"{rate:g}" for rate in tried), "chosen", "by the rules"]),
        row(["---"] * (len(tried) + 3)),
    ]
    for name, of in rates.items():
        seen = [of["tried"].get(f"{rate:g}") for rate in tried]
        lines.append(row([name, *map(_trial_cell, seen), *map(_rate_cell, (of["chosen"], of["by_rules"]))]))
    return "\n".join(lines)


def _trial_cell(one: Mapping[str, float] | None) -> str:
    """Reward (rules) of a trial; nothing if it was not made."""
    return "" if one is None else f"{one['reward']:.4f} ({one['rules']:.3f})" if one else "diverged"


def _rate_cell(rate: float | None) -> str:
    """A chosen rate; one at the grid's end may not be the best that there is."""
    return "" if rate is None else f"{rate:g}{', the end of the grid' if rate in (GRID[0], GRID[-1]) else ''}"


def render_document(found: Mapping[str, Any], findings: Sequence[Finding], costs: Mapping[str, Any]) -> str:
    """study.md."""
    recipe, made = found["recipe"], found["machine"]
    state = "all seeds asked for" if found["complete"] else "INCOMPLETE: only the seeds finished for all methods"
    state += "".join(f"; {run} diverged, and its seed is left out for all" for run in found["diverged"])
    images, seeds = recipe["evaluation"]["images"], found["seeds"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        "# Table 2 on the embedded world",
        f"`{found['command']}`; {versions}; {made['processor']}, {made['cores']} cores; commits "
        f"{', '.join(found['commits'])}; world {', '.join(found['worlds'])}.",
        f"Seeds {seeds} ({state}). {recipe['iterations']} iterations of {recipe['rollout']['batch']} images, "
        f"{recipe['rollout']['steps']} steps, {images} held-out images a run, the noise of a seed the same for all. "
        "± is half of the 95% interval over seeds (Student's t): it speaks of other seeds, not of other prompts. The "
        "intervals are not corrected for their number.",
        table_2(found, costs),
        "Gains over the base, paired image by image:",
        gains_table(found),
        "## What the paper found",
        *(finding.markdown() for finding in findings),
        "## Learning rates",
        "Reward (rules) on the validation prompts, seed of its own; the rate chosen, and the one with the best rules "
        "among those tried. All that is said above holds for the rates chosen.",
        rates_table(found["rates"]),
    ]
    return "\n\n".join(parts) + "\n"
