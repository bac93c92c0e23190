"""Check what `make demo` promises, from the files that it writes.

    python -m benchmarks.demo.check_demo outputs/leapalign_flux

On held-out prompts the reward rises by more than three paired standard errors, one of the scorers that are not trained
on by more than two, the rule-based score does not fall, and junk stays under 1.5%; the run takes at most five minutes,
and pictures and tuned weights exist. Prints what fails and exits with 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STANDARD_ERRORS, OTHER_SCORERS = 3.0, 2.0
JUNK = 0.015
SECONDS = 300.0
PICTURES = ("reward.png", "samples.png", "heldout.png", "plan.svg")
NEEDED = ("reward_before", "reward_after", "reward_gain", "reward_gain_se", "seconds",
          "rule_before", "rule_after", "junk_before", "junk_after")  # fmt: skip


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Return the last line of metrics.jsonl, which is the evaluation of a finished run."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if last.get("kind") != "evaluation":
        raise SystemExit(f"{path} does not end in an evaluation: the demo did not run to its end.")
    return last


def failed_promises(folder: Path, evaluation: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each promise of the demo that does not hold."""
    missing = [name for name in NEEDED if not isinstance(evaluation.get(name), int | float)]
    if missing:
        yield f"the evaluation lacks {', '.join(missing)}"
        return
    gain, error = evaluation["reward_gain"], evaluation["reward_gain_se"]
    if not gain > STANDARD_ERRORS * error:
        yield f"the reward rose by {gain:.4f}, which is not more than {STANDARD_ERRORS:g} x {error:.4f}"
    yield from failed_quality_checks(evaluation)
    if not evaluation["seconds"] <= SECONDS:
        yield f"it took {evaluation['seconds']:.0f} s, more than {SECONDS:.0f} s"
    for name in PICTURES:
        if not (folder / name).is_file() or (folder / name).stat().st_size < 1000:
            yield f"{folder / name} is missing or empty"
    if not list((folder / "transformer").glob("*.safetensors")):
        yield f"{folder / 'transformer'} holds no tuned weights (*.safetensors)"


def failed_quality_checks(evaluation: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each sign that the higher reward is no better picture."""
    others = evaluation.get("metrics") or {}
    rises = {name: line["reward_gain"] / max(line["reward_gain_se"], 1e-12) for name, line in others.items()}
    if others and not max(rises.values()) > OTHER_SCORERS:
        rises_text = ", ".join(f"{name} {rise:+.1f}" for name, rise in rises.items())
        yield f"no further scorer rose by more than {OTHER_SCORERS:g} paired standard errors: {rises_text}"
    if not evaluation["rule_after"] >= evaluation["rule_before"]:
        yield f"the rule-based score fell, {evaluation['rule_before']:.4f} -> {evaluation['rule_after']:.4f}"
    if not evaluation["junk_after"] < JUNK:
        yield f"{evaluation['junk_after']:.2%} of the pixels are junk, not less than {JUNK:.1%}"


def main(folder: Path) -> int:
    """Print the figures, and what fails."""
    evaluation = read_evaluation(folder)
    for name in NEEDED:
        value = evaluation.get(name)
        print(f"  {name:16} {value:.4f}" if isinstance(value, float) else f"  {name:16} {value}")
    for name, line in {**evaluation.get("metrics", {}), **evaluation.get("diversity", {})}.items():
        kind = "reward" if "reward_gain" in line else "diversity"
        print(f"  {name}, {kind}: {line[f'{kind}_before']:.4f} -> {line[f'{kind}_after']:.4f}")
    failures = list(failed_promises(folder, evaluation))
    for line in failures:
        print(f"demo: {line}", file=sys.stderr)
    if not failures:
        rise = evaluation["reward_gain"] / max(evaluation["reward_gain_se"], 1e-12)
        print(f"demo: reward +{rise:.1f} paired standard errors; all files are there")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/leapalign_flux")))
