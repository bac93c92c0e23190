"""The study's Markdown: Table 2, gains, learning rates, findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.findings import Finding
from benchmarks.study.methods import GRID
from benchmarks.study.seed_statistics import CATEGORIES, NAMED


def table_2(record: Mapping[str, Any], costs: Mapping[str, Any]) -> str:
    """Return Table 2: means over seeds with the half-width of their 95% intervals."""
    columns = [*NAMED, *CATEGORIES]
    head = ["method", "rate", *NAMED.values(), *CATEGORIES, "s / it.", "MiB"]
    lines = [row(head), row(["---"] * len(head))]
    for name, line in record["summary"].items():
        chosen = record["rates"].get(name, {}).get("chosen")
        cells = [cell(line[column]["mean"], half_width(line[column]), column) for column in columns]
        cost = costs.get(name)
        spent = [f"{cost['seconds']['median']:.2f}", f"{cost['peak_bytes'] / 2**20:.0f}"] if cost else ["", ""]
        lines.append(row([name, f"{chosen:g}" if chosen else "", *cells, *spent]))
    return "\n".join(lines)


def gains_table(record: Mapping[str, Any]) -> str:
    """Return the gains over the base, paired by image, with the half-width of the 95% interval over seeds."""
    columns = [*NAMED, *CATEGORIES, "junk", "diversity"]
    lines = [row(["gain", *(NAMED.get(c, c) for c in columns)]), row(["---"] * (len(columns) + 1))]
    for name, line in record["summary"].items():
        if name != "base":
            gains = [line[column]["gain"] for column in columns]
            lines.append(
                row([name, *(cell(gain["mean"], half_width(gain), c, "+") for gain, c in zip(gains, columns))])
            )
    return "\n".join(lines)


def half_width(line: Mapping[str, Any]) -> float | None:
    """Return half of the interval's width; None for a single seed."""
    return None if line["low"] is None else (line["high"] - line["low"]) / 2


def cell(mean: float, width: float | None, figure: str, sign: str = "") -> str:
    """Format a figure with its interval; shares with three digits, scores with four."""
    digits = 3 if figure in ("rules", *CATEGORIES) else 4
    beside = "" if width is None else f" ±{width:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{beside}"


def row(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rates_table(rates: Mapping[str, Any]) -> str:
    """Return how the rates were chosen: the validation reward of each trial, and the choice by the rules."""
    tried = sorted({float(rate) for choice in rates.values() for rate in choice.get("tried", {})})
    if not tried:
        return "The rates were given, not chosen here."
    lines = [
        row(["method", *(f"{rate:g}" for rate in tried), "chosen", "by the rules"]),
        row(["---"] * (len(tried) + 3)),
    ]
    for name, choice in rates.items():
        trials = [choice["tried"].get(f"{rate:g}") for rate in tried]
        lines.append(row([name, *map(_trial_cell, trials), *map(_rate_cell, (choice["chosen"], choice["by_rules"]))]))
    return "\n".join(lines)


def _trial_cell(one: Mapping[str, float] | None) -> str:
    """Format reward (rules) of a trial; "" if it was not made."""
    return "" if one is None else f"{one['reward']:.4f} ({one['rules']:.3f})" if one else "diverged"


def _rate_cell(rate: float | None) -> str:
    """Format a chosen rate; one at the grid's end may not be the best that there is."""
    return "" if rate is None else f"{rate:g}{', the end of the grid' if rate in (GRID[0], GRID[-1]) else ''}"


def render_document(record: Mapping[str, Any], findings: Sequence[Finding], costs: Mapping[str, Any]) -> str:
    """Return study.md."""
    recipe, machine = record["recipe"], record["machine"]
    state = "all seeds asked for" if record["complete"] else "INCOMPLETE: only the seeds finished for all methods"
    state += "".join(f"; {run} diverged, and its seed is left out for all" for run in record["diverged"])
    images, seeds = recipe["evaluation"]["images"], record["seeds"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        "# Table 2 on the embedded world",
        f"`{record['command']}`; {versions}; {machine['processor']}, {machine['cores']} cores; commits "
        f"{', '.join(record['commits'])}; world {', '.join(record['worlds'])}.",
        f"Seeds {seeds} ({state}). {recipe['iterations']} iterations of {recipe['rollout']['batch']} images, "
        f"{recipe['rollout']['steps']} steps, {images} held-out images a run, the noise of a seed the same for all. "
        "± is half of the 95% interval over seeds (Student's t): it speaks of other seeds, not of other prompts. The "
        "intervals are not corrected for their number.",
        table_2(record, costs),
        "Gains over the base, paired image by image:",
        gains_table(record),
        "## What the paper found",
        *(finding.markdown() for finding in findings),
        "## Learning rates",
        "Reward (rules) on the validation prompts, seed of its own; the rate chosen, and the one with the best rules "
        "among those tried. All that is said above holds for the rates chosen.",
        rates_table(record["rates"]),
    ]
    return "\n\n".join(parts) + "\n"
