"""Pictures and tables of a run, from its records: reward curve, samples before and after, closing table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor
from torch.nn import functional

from trajsurgery.evaluation.calibration import interval
from trajsurgery.evaluation.held_out import HeldOutScores
from trajsurgery.evaluation.paired_statistics import in_standard_errors
from trajsurgery.runs.reports import validation_report

BEFORE, AFTER = "#7a8691", "#0b6e99"
BAR = "bar: two paired standard errors of the gain"
RULES = {"rule": "rule-based score", "junk": "junk pixels"}


def model_label(model: str) -> str:
    """Return a model's name for titles: of a folder its own name, without the path."""
    return Path(model).name if Path(model).is_absolute() else model


def draw_curve(path: Path, title: str, records: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the training reward, its moving mean, and the held-out reward before and after.

    Below it are the validation rounds and the anchor, if the run had them.

    Args:
        records: the lines of metrics.jsonl; the evaluation's may be missing.
    """
    from matplotlib.figure import Figure

    lines = [r for r in records if r["kind"] == "iteration" and r["reward"] is not None]
    evaluation = next((r for r in records if r["kind"] == "evaluation"), None)
    below = validation_report.panels(records)
    figure = Figure(figsize=(8, 4.6 + 2.4 * len(below)), layout="constrained")
    heights = [1.6, *[1.0] * len(below)]
    axes, *others = figure.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    times, rewards = [r["iteration"] for r in lines], [r["reward"] for r in lines]
    axes.plot(times, rewards, color=AFTER, alpha=0.25, linewidth=1, label="training prompts, batch by batch")
    axes.plot(times, validation_report.smoothed(rewards), color=AFTER, linewidth=2, label="their moving mean")
    if evaluation is not None and lines:
        ends = ((times[0], "before", BEFORE), (times[-1], "after (EMA)", AFTER))
        for t, when, colour in ends:
            mean = evaluation[f"reward_{when.split()[0]}"]
            bar = 2 * (evaluation["reward_gain_se"] or 0) if when != "before" else None
            axes.errorbar(t, mean, bar, fmt="o", color=colour, capsize=4, markeredgecolor="white", markersize=9,
                          label=f"held-out prompts, {when}: {mean:.3f}")  # fmt: skip
    axes.set(ylabel="reward", title=title)
    for part, draw in zip(others, below):
        draw(part, records)
    for part in (axes, *others):
        part.spines[["top", "right"]].set_visible(False)
        part.grid(alpha=0.2)
    (others or [axes])[-1].set_xlabel("iteration")
    figure.legend(
        *axes.get_legend_handles_labels(),
        frameon=False,
        loc="outside lower center",
        ncols=2,
        fontsize=9,
        title=BAR if evaluation else "",
        title_fontsize=9,
    )
    figure.savefig(path, dpi=150)
    return path


def draw_samples(path: Path, title: str, before: HeldOutScores, after: HeldOutScores) -> Path:
    """Draw images before | after from the same prompt and noise, with the rules' verdict and the reward below each.

    `choose_pictures` says which ones.
    """
    from matplotlib.figure import Figure

    places, remark = choose_pictures(before, after, count=12)
    columns = min(3, len(places))
    rows = math.ceil(len(places) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.15 * rows + 0.95), layout="constrained")
    rules = "✓ ✗ and frames: the rules' verdict; " if before.correct is not None else ""
    figure.suptitle(f"{title}\n{remark}\n{rules}numbers: the reward", fontsize=12)
    parts = figure.subfigures(rows, columns, squeeze=False, wspace=0.06).flat
    for part, place in zip(parts, places):
        _pair(part, place, before, after)
    figure.savefig(path, dpi=110)
    return path


def choose_pictures(before: HeldOutScores, after: HeldOutScores, count: int) -> tuple[list[int], str]:
    """Return which images to draw, and a remark that says so.

    They are the first ones, which are spread over the categories. Where there are rules, the second half are the first
    images whose verdict changed, for better and for worse in proportion.
    """
    available = min(len(before.pictures), len(after.pictures))
    if before.correct is None or after.correct is None:
        return list(range(min(count, available))), "the first held-out prompts, same noise"
    first = list(range(min(count // 2, available)))
    improved = (~before.correct & after.correct).nonzero().flatten().tolist()
    broken = (before.correct & ~after.correct).nonzero().flatten().tolist()
    slots = count - len(first)
    share = round(slots * len(improved) / max(1, len(improved) + len(broken)))
    parts = [[i for i in part if len(first) <= i < available] for part in (improved, broken)]
    others = parts[0][:share] + parts[1][: slots - share]
    remark = f"the first {len(first)} held-out images, then the first whose verdict changed, in proportion"
    return first + others, f"{remark} ({len(improved)} to right, {len(broken)} to wrong of {len(before.texts)})"


def _pair(part: Any, place: int, before: HeldOutScores, after: HeldOutScores) -> None:
    part.suptitle(before.texts[place], fontsize=10.5)
    grid = (2, 1) if before.pictures.dim() == 5 else (1, 2)  # the frames of a video stand side by side
    for axes, scores, when in zip(part.subplots(*grid), (before, after), ("before", "after")):
        axes.imshow(_pixels(scores.pictures[place]), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        verdict, colour = _verdict(scores, place)
        axes.set_xlabel(f"{when}{verdict}  {float(scores.reward[place]):.2f}", fontsize=9, color=colour)
        axes.spines[:].set_color(colour)
        axes.spines[:].set_linewidth(1.5 if scores.correct is not None else 0.5)


def _verdict(scores: HeldOutScores, place: int) -> tuple[str, str]:
    if scores.correct is None:
        return "", "black"
    return (" ✓", "#2e7d32") if bool(scores.correct[place]) else (" ✗", "#b3442e")


def _pixels(picture: Tensor) -> Any:
    """Return pixels of an image [3 h w] or a video [frames 3 h w], frames side by side."""
    frames = picture if picture.dim() == 4 else picture[None]
    separated = functional.pad(frames, (0, 1), value=255)  # a white pixel between frames
    return separated.permute(2, 0, 3, 1).flatten(1, 2)[:, :-1].numpy()


def draw_held_out(path: Path, title: str, evaluation: Mapping[str, Any]) -> Path:
    """Draw each gain in its own standard errors, and the reward's calibration."""
    from matplotlib.figure import Figure

    calibration = evaluation.get("calibration")
    figure = Figure(figsize=(11 if calibration else 6, 4.4), layout="constrained")
    figure.suptitle(f"{title}; {evaluation['images']} held-out images, same prompts and noise", fontsize=11)
    axes = figure.subplots(1, 2 if calibration else 1, squeeze=False)[0]
    _draw_gains(axes[0], evaluation)
    if calibration:
        _draw_reliability(axes[1], calibration)
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
        part.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    return path


def _draw_gains(axes: Any, evaluation: Mapping[str, Any]) -> None:
    """Draw a dot for each figure, with its means before and after."""
    lines = [line for line in table_rows(evaluation) if line[1][f"{line[2]}_gain_se"]]
    sizes = [in_standard_errors(record, name) for _, record, name in lines]
    places = list(range(len(lines) - 1, -1, -1))
    axes.axvspan(-2, 2, color=BEFORE, alpha=0.15, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.plot(sizes, places, "o", color=AFTER, markersize=8)
    for size, place, (_, record, name) in zip(sizes, places, lines):
        label = f"{record[f'{name}_before']:.4f} → {record[f'{name}_after']:.4f}"
        axes.annotate(label, (size, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(places, [label for label, _, _ in lines])
    axes.set(ylim=(-0.6, len(lines) - 0.3), title="gains, before → after (EMA)",
             xlabel="gain in its own paired standard errors (grey: less than two, may be chance)")  # fmt: skip
    axes.margins(x=0.2)


def _draw_reliability(axes: Any, calibration: Mapping[str, Any]) -> None:
    """Draw the share of right images by reward, in quantile bins, before and after."""
    for when, label, colour in (("before", "before", BEFORE), ("after", "after (EMA)", AFTER)):
        curve = calibration[when]
        x, y = [line["score"] for line in curve["bins"]], [line["correct"] for line in curve["bins"]]
        bars = [[abs(line["correct"] - interval(line["correct"], line["images"])[end]) for line in curve["bins"]]
                for end in (0, 1)]  # fmt: skip
        area = "" if curve["auc"] is None else f": AUC {curve['auc']:.3f}, slope {curve['slope']:.2f}"
        axes.errorbar(x, y, bars, fmt="o-", color=colour, capsize=3, linewidth=1.5, label=f"{label}{area}")
    counts = [line["images"] for when in ("before", "after") for line in calibration[when]["bins"]]
    least, most = min(counts, default=0), max(counts, default=0)
    each = f"{least}" if least == most else f"{least} to {most}"
    axes.set(xlabel=f"reward, mean of a quantile bin of {each} images", ylabel="share that the rules call right",
             ylim=(-0.03, 1.03), title="calibration of the reward")  # fmt: skip
    axes.legend(frameon=False, loc="upper left", title="bar: 95% interval of the share", title_fontsize=9, fontsize=9)


def table_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """Return (label, record, name in it) of every figure of all images that has a before and an after."""
    rows: list[tuple[str, Mapping[str, Any], str]] = [("reward", evaluation, "reward")]
    rows += [
        (validation_report.scorer_label(name), line, "reward") for name, line in evaluation.get("metrics", {}).items()
    ]
    rows += [(label, evaluation, name) for name, label in RULES.items() if f"{name}_before" in evaluation]
    rows += [(f"diversity, {name}", line, "diversity") for name, line in evaluation.get("diversity", {}).items()]
    return rows


def results_table(evaluation: Mapping[str, Any]) -> Table:
    """Return the closing table: reward, further scorers, rules, junk and diversity, with standard errors."""
    table = Table(title=f"{evaluation['images']} held-out images, same prompts and noise, EMA weights")
    for heading in ("", "before", "after", "gain", "± paired SE"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, record, name in table_rows(evaluation):
        main = record is evaluation and name in ("reward", "rule")
        table.add_row(label, *_figures(record, name), style="bold" if main else "")
    parts = {"reward": "reward", "rule": "rules", "diversity": "diversity"}
    for category, part in evaluation["categories"].items() if len(evaluation["categories"]) > 1 else ():
        for name, label in parts.items():
            if f"{name}_before" in part:
                table.add_row(f"  {category}: {label}", *_figures(part, name), style="dim")
    return table


def _figures(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    before, after, gain, se = (record[f"{name}_{what}"] for what in ("before", "after", "gain", "gain_se"))
    if _is_nan(gain):
        return "none", "none", "none", ""
    return f"{before:.4f}", f"{after:.4f}", f"{gain:+.4f}", "" if se is None or math.isnan(se) else f"{se:.4f}"


def remarks(evaluation: Mapping[str, Any]) -> list[str]:
    """Return sentences on the reward's calibration, the images' diversity and the guards."""
    sentences = [
        f"scores of {name} that are not finite, left out with their pairs: {before} before, {after} after, of "
        f"{evaluation['images']}"
        for name, (before, after) in evaluation.get("not_finite", {}).items()
    ]
    for label, line, name in table_rows(evaluation):
        if name == "reward" and line.get("rule_expected") is not None:
            before, after = (line["calibration"][when] for when in ("before", "after"))
            sentences.append(
                f"{label} against the rules: AUC {_number(before['auc'])} -> {_number(after['auc'])}, slope "
                f"{_number(before['slope'])} -> {_number(after['slope'])}; by the curve of the untuned model its "
                f"scores promise {line['rule_expected']:.3f} right, the rules find {evaluation['rule_after']:.3f}"
            )
    pixels = evaluation.get("diversity", {}).get("pixels")
    if pixels is not None:
        sentences.append(
            f"diversity: the mean distance between images of one prompt, over the {pixels['prompts']} prompts with "
            "several; pixels: root mean square difference, scorers: 1 - cosine of embeddings"
        )
    elif "diversity" in evaluation:
        sentences.append("diversity: not measured, no prompt has two held-out images; raise --evaluation.images")
    return sentences + validation_report.remarks(evaluation)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def verdict(evaluation: Mapping[str, Any]) -> str:
    """Return one sentence on the reward, and on the rules if there are some."""
    sentence = _sentence(evaluation, "reward", "held-out reward")
    return f"{sentence}; {_sentence(evaluation, 'rule', 'rule-based score')}" if "rule_gain" in evaluation else sentence


def _sentence(evaluation: Mapping[str, Any], name: str, label: str) -> str:
    if _is_nan(evaluation[f"{name}_gain"]):
        return f"{label}: no pair of scores is finite"
    size = in_standard_errors(evaluation, name)
    return f"{label} {evaluation[f'{name}_gain']:+.4f}" + (
        "" if math.isnan(size) else f", {size:+.1f} paired standard errors"
    )


def _is_nan(value: float | None) -> bool:
    """Whether a figure is NaN, or null as in metrics.jsonl."""
    return value is None or math.isnan(value)
