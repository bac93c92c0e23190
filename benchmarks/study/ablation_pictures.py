"""The ablations' picture: reward, scorer b, rules and gradient norm of the variants, for every part of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.study.ablation_variants import CENTRE, NORM
from benchmarks.study.pictures import draw_interval
from benchmarks.study.seed_statistics import interval

COLUMNS = {"reward": "reward, gain", "tiny:scorer_b": "scorer b, gain", "rules": "rules, gain", NORM: NORM}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a row for each part of the paper, a column for each figure, the centre in another colour."""
    groups, runs, seeds = record["groups"], record["runs"], record["seeds"]
    heights = [1 + len(names) for names in groups.values()]
    figure = Figure(figsize=(15, 0.42 * sum(heights) + 1), layout="constrained")
    grid = figure.subplots(len(groups), len(COLUMNS), squeeze=False, height_ratios=heights, sharex="col")
    for line, (group, names) in zip(grid, groups.items()):
        for axes, (key, title) in zip(line, COLUMNS.items()):
            for place, name in enumerate(reversed(names)):
                start = {seed: 0 if key == NORM else runs["base"][seed][key] for seed in seeds}
                values = [runs[name][seed][key] - start[seed] for seed in seeds]
                draw_interval(axes, interval(values), values, place, "#0b6e99" if name == CENTRE else "#8a6d3b")
                if name == CENTRE:
                    axes.axvline(interval(values).mean, color="#0b6e99", linewidth=0.8, linestyle=":")
            axes.set(yticks=range(len(names)), ylim=(-0.7, len(names) - 0.4))
            if key == NORM:
                axes.set_xscale("log")
            else:
                axes.locator_params(axis="x", nbins=5)
            labels = [f"{name} (the method)" if name == CENTRE else name for name in reversed(names)]
            if set(names) <= set(record["MiB"]):
                labels = [f"{label}, {record['MiB'][name]:.0f} MiB" for label, name in zip(labels, reversed(names))]
            axes.set_yticklabels(labels if key == "reward" else [])
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2, axis="x")
            axes.set_title(f"{group}\n{title}" if key == "reward" else title, fontsize=9)
    note = f"dots: seeds {seeds}; bar: mean and 95% interval over seeds"
    figure.suptitle(note if record["complete"] else f"{note} (incomplete)")
    figure.savefig(path, dpi=120)
