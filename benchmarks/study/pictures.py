"""The study's pictures: gains with intervals, curves over training, images of the same noise side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.study.report import BIN
from benchmarks.study.runs import Task, load_scores
from benchmarks.study.seed_statistics import CATEGORIES, Interval, interval

COLOURS = {
    "base": "#7a8691",
    "refl": "#e0a458",
    "draft_lv": "#b3442e",
    "drtune": "#2e7d32",
    "leapalign": "#0b6e99",
    "flowbp_sparse": "#8e6bbf",
    "flowbp_bridge": "#c06c9b",
    "flowbp_lagrange": "#5aa9c7",
}
PANELS = {
    "reward": "reward",
    "tiny:scorer_b": "scorer b",
    "tiny:scorer_c": "scorer c",
    "rules": "rules, all categories",
}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw study.png: gains of scores and rules, gains by category, Fig. 1a, Fig. 5."""
    figure = Figure(figsize=(16, 11), layout="constrained")
    grid = figure.add_gridspec(3, 12)
    names, seeds = [name for name in record["summary"] if name != "base"], record["seeds"]
    for place, (key, title) in enumerate(PANELS.items()):
        _draw_gains(
            figure.add_subplot(grid[0, 3 * place : 3 * place + 3]), record, names, key, title, labelled=place == 0
        )
    for place, category in enumerate(CATEGORIES):
        _draw_gains(
            figure.add_subplot(grid[1, 2 * place : 2 * place + 2]),
            record,
            names,
            category,
            f"rules: {category}",
            labelled=place == 0,
        )
    _draw_training(figure.add_subplot(grid[2, :6]), record, names)
    _draw_stages(figure.add_subplot(grid[2, 6:9]), record, names, "reward", "held-out reward in training")
    _draw_stages(figure.add_subplot(grid[2, 9:]), record, names, "rules", "held-out rules in training (Fig. 5)")
    note = f"gain over the base, paired; dots: seeds {seeds}; bar: mean and 95% interval over seeds"
    figure.suptitle(note if record["complete"] else f"{note} (incomplete: not all seeds are finished)")
    figure.savefig(path, dpi=130)


def _final_figure(record: Mapping[str, Any], name: str, seed: int, key: str) -> float:
    figures_by_stage = record["runs"][name][seed]
    return figures_by_stage[max(figures_by_stage)][key]


def _gains_over_base(record: Mapping[str, Any], name: str, key: str) -> list[float]:
    return [
        _final_figure(record, name, seed, key) - _final_figure(record, "base", seed, key) for seed in record["seeds"]
    ]


def _draw_gains(
    axes: Any, record: Mapping[str, Any], names: Sequence[str], key: str, title: str, labelled: bool
) -> None:
    """Draw a row for each method: a dot for each seed, mean and interval."""
    for place, name in enumerate(reversed(names)):
        values = _gains_over_base(record, name, key)
        draw_interval(axes, interval(values), values, place, COLOURS.get(name, "#0b6e99"))
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set(title=title, yticks=range(len(names)))
    axes.set_yticklabels(list(reversed(names)) if labelled else [])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, axis="x")


def draw_interval(axes: Any, mean: Interval, values: Sequence[float], place: float, colour: str) -> None:
    """Draw dots, and the mean with its interval above them."""
    axes.plot(values, [place - 0.2] * len(values), "o", color=colour, alpha=0.4, markersize=4)
    axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
    axes.plot([mean.mean], [place], "o", color=colour, markersize=7, markeredgecolor="white")


def _draw_training(axes: Any, record: Mapping[str, Any], names: Sequence[str]) -> None:
    """Draw Fig. 1a: the rollouts' reward, mean over seeds."""
    for name in names:
        lines = [record["training"][name][seed]["reward"] for seed in record["seeds"]]
        means = [statistics.fmean(bin_rewards) for bin_rewards in zip(*lines)]
        middles = [BIN * (i + 0.5) for i in range(len(means))]
        axes.plot(middles, means, "-", color=COLOURS.get(name), label=name, linewidth=2 if name == "leapalign" else 1.2)
    axes.set(title="reward of the rollouts in training (Fig. 1a)", xlabel="iteration")
    axes.legend(frameon=False, fontsize=9, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def _draw_stages(axes: Any, record: Mapping[str, Any], names: Sequence[str], key: str, title: str) -> None:
    """Draw the mean over seeds of a figure at each stage, with the interval of its gain at the last."""
    seeds = record["seeds"]
    start = statistics.fmean(_final_figure(record, "base", seed, key) for seed in seeds)
    for place, name in enumerate(names):
        marks = sorted(record["runs"][name][seeds[0]])
        means = [statistics.fmean(record["runs"][name][seed][mark][key] for seed in seeds) for mark in marks]
        axes.plot([0, *marks], [start, *means], "o-", color=COLOURS.get(name), markersize=4)
        gain = interval(_gains_over_base(record, name, key))
        x = marks[-1] * (1.02 + 0.012 * place)
        axes.plot([x, x], [start + gain.low, start + gain.high], color=COLOURS.get(name), linewidth=2)
    axes.set(title=title, xlabel="iteration")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def draw_samples(tasks: Mapping[str, Mapping[int, Task]], seed: int, path: Path, count: int = 18) -> None:
    """Draw study_samples.png (Fig. 3): prompts of every category, a column for each method, one noise in a row."""
    scores_by_method = {
        name: load_scores(tasks_by_seed[seed].folder, tasks_by_seed[seed].stages[-1])
        for name, tasks_by_seed in tasks.items()
    }
    count = min(count, *(len(scores.pictures) for scores in scores_by_method.values()))
    figure = Figure(figsize=(1.25 * len(scores_by_method) + 3.2, 1.3 * count), layout="constrained")
    grid = figure.subplots(count, len(scores_by_method), squeeze=False)
    for column, (name, scores) in enumerate(scores_by_method.items()):
        assert scores.correct is not None, "the embedded world has rules"
        for line in range(count):
            axes = grid[line][column]
            axes.imshow(scores.pictures[line].permute(1, 2, 0).numpy(), interpolation="nearest")
            right = bool(scores.correct[line])
            axes.set_xlabel(f"{'right' if right else 'wrong'} {float(scores.reward[line]):.2f}", fontsize=7, labelpad=2)
            axes.spines[:].set_color("#2e7d32" if right else "#b3442e")
            axes.spines[:].set_linewidth(2)
            axes.set(xticks=[], yticks=[])
            if line == 0:
                axes.set_title(name, fontsize=8)
            if column == 0:
                axes.set_ylabel(scores.texts[line], rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(f"seed {seed}, same noise in a row; frame and word: the rules' verdict; number: reward", fontsize=9)
    figure.savefig(path, dpi=110)
