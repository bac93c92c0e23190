"""Asserts what `make demo` promises, from the files it leaves behind.

    python -m benchmarks.demo.check_demo outputs/leapalign_flux

The gate: on held-out prompts the reward rises by more than three paired standard errors, one of the scorers that no
gradient climbs by more than two, the rule-based score does not fall, and junk stays under 1.5%; within five minutes,
and pictures and tuned weights are there. Exits with 1 and says what is missing otherwise.
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
    """The last line of metrics.jsonl, which is the evaluation of a finished run."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if last.get("kind") != "evaluation":
        raise SystemExit(f"{path} does not end in an evaluation: the demo did not run to its end.")
    return last


def failed_promises(folder: Path, found: dict[str, Any]) -> Iterator[str]:
    """What the demo promised and did not keep."""
    missing = [name for name in NEEDED if not isinstance(found.get(name), int | float)]
    if missing:
        yield f"the evaluation lacks {', '.join(missing)}"
        return
    gain, error = found["reward_gain"], found["reward_gain_se"]
    if not gain > STANDARD_ERRORS * error:
        yield f"the reward rose by {gain:.4f}, which is not more than {STANDARD_ERRORS:g} x {error:.4f}"
    yield from failed_quality_checks(found)
    if not found["seconds"] <= SECONDS:
        yield f"it took {found['seconds']:.0f} s, more than {SECONDS:.0f} s"
    for name in PICTURES:
        if not (folder / name).is_file() or (folder / name).stat().st_size < 1000:
            yield f"{folder / name} is missing or empty"
    if not list((folder / "transformer").glob("*.safetensors")):
        yield f"{folder / 'transformer'} holds no tuned weights (*.safetensors)"


def failed_quality_checks(found: dict[str, Any]) -> Iterator[str]:
    """What says that the higher reward is no better picture."""
    others = found.get("metrics") or {}
    rises = {name: line["reward_gain"] / max(line["reward_gain_se"], 1e-12) for name, line in others.items()}
    if others and not max(rises.values()) > OTHER_SCORERS:
        told = ", ".join(f"{name} {rise:+.1f}" for name, rise in rises.items())
        yield f"no further scorer rose by more than {OTHER_SCORERS:g} paired standard errors: {told}"
    if not found["rule_after"] >= found["rule_before"]:
        yield f"the rule-based score fell, {found['rule_before']:.4f} -> {found['rule_after']:.4f}"
    if not found["junk_after"] < JUNK:
        yield f"{found['junk_after']:.2%} of the pixels are junk, not less than {JUNK:.1%}"


def main(folder: Path) -> int:
    """Prints the figures, and what is wrong with them."""
    found = read_evaluation(folder)
    for name in NEEDED:
        value = found.get(name)
        print(f"  {name:16} {value:.4f}" if isinstance(value, float) else f"  {name:16} {value}")
    for name, line in {**found.get("metrics", {}), **found.get("diversity", {})}.items():
        kind = "reward" if "reward_gain" in line else "diversity"
        print(f"  {name}, {kind}: {line[f'{kind}_before']:.4f} -> {line[f'{kind}_after']:.4f}")
    wrong = list(failed_promises(folder, found))
    for line in wrong:
        print(f"demo: {line}", file=sys.stderr)
    if not wrong:
        rise = found["reward_gain"] / max(found["reward_gain_se"], 1e-12)
        print(f"demo: reward +{rise:.1f} paired standard errors; all files are there")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/leapalign_flux")))
