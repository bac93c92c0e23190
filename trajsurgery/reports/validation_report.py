"""What a report says of the guards (guards.py, anchor.py) and draws below the reward's curve. Reads records only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trajsurgery.evaluation.validation_rounds import ValidationResult

REWARD, SCORERS = "#0b6e99", ("#b3442e", "#d08a1e", "#6a4c93", "#2e7d32", "#7a8691")

Records = Sequence[Mapping[str, Any]]


def said(name: str) -> str:
    """What a report calls a scorer beside the reward, or a part of a reward that is a sum (scorers.parts)."""
    return f"part {name}" if "*" in name else f"scorer {name}"


def line(look: ValidationResult) -> str:
    """A look, while it trains."""
    told = " ".join(f"{name} {mean:.4f}" for name, mean in _graded(asdict(look)).items())
    waited = f"; {look.waited} without a new best (iteration {look.best})" if look.waited else ""
    return f"iteration {look.iteration}, validation prompts, averaged weights: {told}{waited}"


def remarks(evaluation: Mapping[str, Any]) -> list[str]:
    """What the guards did to the run, if it had any."""
    found, guards = list[str](), evaluation.get("guards", {})
    if guards.get("stopped"):
        found.append(
            f"stopped early at iteration {evaluation['iterations']}: scorer {guards['by']} had no new best on "
            f"validation prompts since iteration {guards['best']}"
        )
    if "kept" in guards and guards["kept"] != evaluation["iterations"]:
        found.append(f"the weights kept are the averaged ones of iteration {guards['kept']}")
    if "anchor" in guards:
        found.append(f"held to the untuned model's velocities with a coefficient of {guards['anchor']:g}")
    return found


def panels(records: Records) -> list[Callable[[Any, Records], None]]:
    """What is drawn below the curve: each takes axes and the lines of metrics.jsonl."""
    looks = any(r["kind"] == "look" for r in records)
    anchor = any(r["kind"] == "iteration" and r.get("anchor") is not None for r in records)
    return [*([_looks] if looks else []), *([_anchor] if anchor else [])]


def _looks(axes: Any, records: Records) -> None:
    """How far each mean has gone from the untuned model's, in standard deviations of its images then."""
    looks = [r for r in records if r["kind"] == "look"]
    times, first = [r["iteration"] for r in looks], looks[0]
    colours = {"reward": REWARD, **dict(zip((n for n in _graded(first) if n != "reward"), SCORERS * 9))}
    for name, colour in colours.items():
        spread = first["spread"]["rule" if name == "rules" else name] or 1.0
        values = [(_graded(r)[name] - _graded(first)[name]) / spread for r in looks]
        axes.plot(times, values, "o-", color=colour, markersize=4, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    evaluation = next((r for r in records if r["kind"] == "evaluation"), None)
    kept = None if evaluation is None else evaluation.get("guards", {}).get("kept")
    if kept is not None:
        axes.axvline(kept, color="black", linestyle=":", linewidth=1.2, label="weights kept")
    axes.set(ylabel="change / spread", title="looks at validation prompts, averaged weights")
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _anchor(axes: Any, records: Records) -> None:
    lines = [r for r in records if r["kind"] == "iteration" and r.get("anchor") is not None]
    times, values = [r["iteration"] for r in lines], [r["anchor"] for r in lines]
    axes.plot(times, values, color=REWARD, alpha=0.25, linewidth=1)
    axes.plot(times, smoothed(values), color=REWARD, linewidth=2)
    axes.set(ylabel="mean $(v - v_{base})^2$", title="distance from the untuned model, at one drawn time an iteration")
    axes.title.set_fontsize(10)


def _graded(look: Mapping[str, Any]) -> dict[str, float]:
    """The means of a look by name, the reward first."""
    rules = {} if look["rule"] is None else {"rules": look["rule"]}
    return {"reward": look["reward"], **look["metrics"], **rules}


def smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """The mean over a centred window of about that share of the values, narrower at the ends."""
    half = max(1, round(len(values) * share / 2))
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
