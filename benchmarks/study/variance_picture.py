"""The picture of variance.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"shared": "#0b6e99", "per-sample": "#c8553d"}
NAMES = {"leapalign": "LeapAlign", "drtune": "DRTune, connected"}


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw a row for each method: variance, variance times time, reward in equal time."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    for parts, method in zip(figure.subplots(2, 3), NAMES):
        plans, runs = record["gradients"][method]["plans"], record["rewards"][method]["plans"]
        _bars(parts[0], {n: (p["variance"], p["interval"]) for n, p in plans.items()})
        parts[0].set(title=f"{NAMES[method]}: variance of the gradient", ylabel="tr Cov / |mean|²")
        _bars(parts[1], {n: (p["variance_by_time"], p["variance_by_time_interval"]) for n, p in plans.items()})
        parts[1].set(title="variance x CPU time, one plan = 1")
        gains = {n: (r["reward_gain"]["mean"], [r["reward_gain"][end] for end in ("low", "high")])
                 for n, r in runs.items()}  # fmt: skip
        _bars(parts[2], gains)
        budget, seeds = record["rewards"]["budget"], len(record["rewards"]["seeds"])
        parts[2].set(title=f"gain, {budget:g} s of CPU, {seeds} seeds")
    for axes in figure.axes:
        axes.title.set_size(10)
    figure.supxlabel("plans a rollout; blue: shared by the batch, red: each sample its own. Bars: 95%", fontsize=9)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, values: dict[str, tuple[float, list[float]]]) -> None:
    """Draw a bar with its interval for each value."""
    for place, (name, (value, (low, high))) in enumerate(values.items()):
        kind = name.rsplit(" ", 1)[0]
        axes.bar(place, value, color=COLOURS[kind], width=0.7)
        axes.errorbar(place, value, [[value - low], [high - value]], color="#222222", capsize=4)
    axes.set_xticks(range(len(values)), [name.rsplit(" ", 1)[1] for name in values])
    axes.axhline(0, color="#222222", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
