"""Lines and plots of validation rounds and the anchor, from a run's records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trajsurgery.evaluation.validation_rounds import ValidationResult

REWARD, SCORERS = "#0b6e99", ("#b3442e", "#d08a1e", "#6a4c93", "#2e7d32", "#7a8691")

Records = Sequence[Mapping[str, Any]]


def scorer_label(name: str) -> str:
    """Return the report's label of a further scorer, or of a part of a reward that is a sum."""
    return f"part {name}" if "*" in name else f"scorer {name}"


def validation_line(result: ValidationResult) -> str:
    """Return the line that is printed for a validation round while the run trains."""
    means = " ".join(f"{name} {mean:.4f}" for name, mean in _mean_scores(asdict(result)).items())
    means += "".join(f"; {count} scores of {name} are not finite" for name, count in result.not_finite.items())
    waited = f"; {result.waited} without a new best (iteration {result.best})" if result.waited else ""
    return f"iteration {result.iteration}, validation prompts, averaged weights: {means}{waited}"


def remarks(evaluation: Mapping[str, Any]) -> list[str]:
    """Return what the guards did to the run, if it had any."""
    sentences, guards = list[str](), evaluation.get("guards", {})
    if guards.get("stopped"):
        sentences.append(
            f"stopped early at iteration {evaluation['iterations']}: scorer {guards['by']} had no new best on "
            f"validation prompts since iteration {guards['best']}"
        )
    if "kept" in guards and guards["kept"] != evaluation["iterations"]:
        sentences.append(f"the weights saved are the averaged ones of iteration {guards['kept']}")
    if "anchor" in guards:
        sentences.append(f"held to the untuned model's velocities with a coefficient of {guards['anchor']:g}")
    return sentences


def panels(records: Records) -> list[Callable[[Any, Records], None]]:
    """Return what to draw below the reward's curve: functions of axes and the lines of metrics.jsonl."""
    validated = any(r["kind"] == "look" for r in records)
    anchored = any(r["kind"] == "iteration" and r.get("anchor") is not None for r in records)
    return [*([_draw_validation] if validated else []), *([_draw_anchor] if anchored else [])]


def _draw_validation(axes: Any, records: Records) -> None:
    """Draw how far each mean has moved from the untuned model's, in standard deviations of its images."""
    rounds = [r for r in records if r["kind"] == "look"]
    times, first = [r["iteration"] for r in rounds], rounds[0]
    colours = {"reward": REWARD, **dict(zip((n for n in _mean_scores(first) if n != "reward"), SCORERS * 9))}
    for name, colour in colours.items():
        spread = first["spread"]["rule" if name == "rules" else name] or 1.0
        values = [(_mean_scores(r)[name] - _mean_scores(first)[name]) / spread for r in rounds]
        axes.plot(times, values, "o-", color=colour, markersize=4, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    evaluation = next((r for r in records if r["kind"] == "evaluation"), None)
    saved_iteration = None if evaluation is None else evaluation.get("guards", {}).get("kept")
    if saved_iteration is not None:
        axes.axvline(saved_iteration, color="black", linestyle=":", linewidth=1.2, label="weights saved")
    axes.set(ylabel="change / spread", title="validation rounds, averaged weights")
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_anchor(axes: Any, records: Records) -> None:
    lines = [r for r in records if r["kind"] == "iteration" and r.get("anchor") is not None]
    times, values = [r["iteration"] for r in lines], [r["anchor"] for r in lines]
    axes.plot(times, values, color=REWARD, alpha=0.25, linewidth=1)
    axes.plot(times, smoothed(values), color=REWARD, linewidth=2)
    axes.set(ylabel="mean $(v - v_{base})^2$", title="distance from the untuned model, at one drawn time an iteration")
    axes.title.set_fontsize(10)


def _mean_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the means of a round by name, the reward first."""
    rules = {} if record["rule"] is None else {"rules": record["rule"]}
    means: dict[str, float | None] = {"reward": record["reward"], **record["metrics"], **rules}
    return {name: math.nan if mean is None else mean for name, mean in means.items()}


def smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Return the mean over a centred window of about that share of the values, narrower at the ends."""
    half = max(1, round(len(values) * share / 2))
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
