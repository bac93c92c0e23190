"""What a run leaves to look at: the reward's curve, samples before and after, a closing table. Reads records only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from trajsurgery.heldout import Scores

BEFORE, AFTER = "#7a8691", "#0b6e99"


def curve(path: Path, title: str, records: Sequence[Mapping[str, Any]]) -> Path:
    """Draws the training reward of each iteration, its moving mean, and the held-out reward before and after.

    The bar is two paired standard errors of the gain.

    Args:
        records: the lines of metrics.jsonl; the evaluation's may be missing.
    """
    from matplotlib.figure import Figure

    lines = [r for r in records if r["kind"] == "iteration" and r["reward"] is not None]
    evaluation = next((r for r in records if r["kind"] == "evaluation"), None)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    times, rewards = [r["iteration"] for r in lines], [r["reward"] for r in lines]
    axes.plot(times, rewards, color=AFTER, alpha=0.25, linewidth=1, label="training prompts, batch by batch")
    axes.plot(times, smoothed(rewards), color=AFTER, linewidth=2, label="their moving mean")
    if evaluation is not None and lines:
        ends = ((times[0], "before", BEFORE), (times[-1], "after (EMA)", AFTER))
        for t, when, colour in ends:
            mean = evaluation[f"reward_{when.split()[0]}"]
            bar = 2 * (evaluation["reward_gain_se"] or 0) if when != "before" else None
            axes.errorbar(t, mean, bar, fmt="o", color=colour, capsize=4, markeredgecolor="white", markersize=9,
                          label=f"held-out prompts, {when}: {mean:.3f}")  # fmt: skip
    axes.set(xlabel="iteration", ylabel="reward", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    return path


def smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """The mean over a centred window of about that share of the values, narrower at the ends."""
    half = max(1, round(len(values) * share / 2))
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def samples(path: Path, title: str, before: Scores, after: Scores, count: int = 12, columns: int = 3) -> Path:
    """Draws images before | after, same prompt and noise, with the rules' verdict and the reward below each.

    None is chosen for its looks: see `shown`.
    """
    from matplotlib.figure import Figure

    places, remark = shown(before, after, count)
    columns = min(columns, len(places))
    rows = math.ceil(len(places) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.15 * rows + 0.7), layout="constrained")
    figure.suptitle(f"{title}\n{remark}", fontsize=12)
    parts = figure.subfigures(rows, columns, squeeze=False, wspace=0.06).flat
    for part, place in zip(parts, places):
        _pair(part, place, before, after)
    figure.savefig(path, dpi=110)
    return path


def shown(before: Scores, after: Scores, count: int) -> tuple[list[int], str]:
    """Which images are drawn, and a remark that says so.

    They are the first ones, which are spread over the categories; where there are rules, the second half are the first
    images whose verdict changed, for better and for worse in proportion to how many did.
    """
    kept = min(len(before.pictures), len(after.pictures))
    if before.correct is None or after.correct is None:
        return list(range(min(count, kept))), "the first held-out prompts, same noise"
    first = list(range(min(count // 2, kept)))
    mended = (~before.correct & after.correct).nonzero().flatten().tolist()
    broken = (before.correct & ~after.correct).nonzero().flatten().tolist()
    slots = count - len(first)
    share = round(slots * len(mended) / max(1, len(mended) + len(broken)))
    parts = [[i for i in part if len(first) <= i < kept] for part in (mended, broken)]
    others = parts[0][:share] + parts[1][: slots - share]
    remark = f"the first {len(first)} held-out images, then the first whose verdict changed, in proportion"
    return first + others, f"{remark} ({len(mended)} to right, {len(broken)} to wrong of {len(before.texts)})"


def _pair(part: Any, place: int, before: Scores, after: Scores) -> None:
    part.suptitle(before.texts[place], fontsize=10.5)
    for axes, scores, when in zip(part.subplots(1, 2), (before, after), ("before", "after")):
        axes.imshow(_pixels(scores.pictures[place]), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        verdict, colour = _verdict(scores, place)
        axes.set_xlabel(f"{when}{verdict}  {float(scores.reward[place]):.2f}", fontsize=9, color=colour)
        axes.spines[:].set_color(colour)
        axes.spines[:].set_linewidth(1.5 if scores.correct is not None else 0.5)


def _verdict(scores: Scores, place: int) -> tuple[str, str]:
    if scores.correct is None:
        return "", "black"
    return (" ✓", "#2e7d32") if bool(scores.correct[place]) else (" ✗", "#b3442e")


def _pixels(picture: Tensor) -> Any:
    return picture.permute(1, 2, 0).numpy()


def table(evaluation: Mapping[str, Any]) -> Table:
    """The closing table: held-out reward, rule-based score and junk, before and after, with paired standard errors."""
    found = Table(title=f"{evaluation['images']} held-out images, same prompts and noise, EMA weights")
    for heading in ("", "before", "after", "gain", "± paired SE"):
        found.add_column(heading, justify="left" if not heading else "right")
    names = {"reward": "reward", "rule": "rule-based score", "junk": "junk pixels"}
    for name, said in names.items():
        if f"{name}_before" in evaluation:
            found.add_row(said, *_figures(evaluation, name), style="bold" if name != "junk" else "")
    for category, part in evaluation["categories"].items():
        if len(evaluation["categories"]) > 1:
            found.add_row(f"  {category}: reward", *_figures(part, "reward"), style="dim")
            if "rule_before" in part:
                found.add_row(f"  {category}: rules", *_figures(part, "rule"), style="dim")
    return found


def _figures(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    before, after, gain, se = (record[f"{name}_{what}"] for what in ("before", "after", "gain", "gain_se"))
    return f"{before:.4f}", f"{after:.4f}", f"{gain:+.4f}", "" if se is None or math.isnan(se) else f"{se:.4f}"


def verdict(evaluation: Mapping[str, Any]) -> str:
    """One sentence on the reward, and on the rules if there are some."""
    said = _sentence(evaluation, "reward", "held-out reward")
    return f"{said}; {_sentence(evaluation, 'rule', 'rule-based score')}" if "rule_gain" in evaluation else said


def _sentence(evaluation: Mapping[str, Any], name: str, said: str) -> str:
    gain, se = evaluation[f"{name}_gain"], evaluation[f"{name}_gain_se"]
    size = f", {gain / se:+.1f} paired standard errors" if se else ""
    return f"{said} {gain:+.4f}{size}"
