"""The check of the demo's figures accepts a good run and says what is wrong with a bad one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/demo/check_demo.py"
GOOD = {"kind": "evaluation", "reward_before": 0.1, "reward_after": 0.3, "reward_gain": 0.2, "reward_gain_se": 0.01,
        "rule_before": 0.5, "rule_after": 0.6, "junk_before": 0.0, "junk_after": 0.0, "seconds": 200.0}  # fmt: skip


def check(folder: Path, record: dict[str, Any] | None, without: str = "") -> subprocess.CompletedProcess[str]:
    for name in ("reward.png", "samples.png", "heldout.png", "plan.svg", "transformer/weights.safetensors"):
        if name != without:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x" * 2000)
    if record is not None:
        (folder / "metrics.jsonl").write_text('{"kind": "iteration"}\n' + json.dumps(record) + "\n")
    return subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)


def test_a_good_run_passes(tmp_path: Path) -> None:
    done = check(tmp_path, GOOD)
    assert done.returncode == 0, done.stderr
    assert "+20.0 paired standard errors" in done.stdout


@pytest.mark.parametrize(
    "change, without, message",
    [
        ({"reward_gain": 0.03}, "", "not more than 3 x 0.0100"),
        ({"reward_gain": -0.2}, "", "not more than 3"),
        ({"reward_gain": float("nan")}, "", "not more than 3"),
        ({"reward_gain_se": float("nan")}, "", "not more than 3"),
        ({"reward_gain_se": None}, "", "lacks reward_gain_se"),
        ({"seconds": 301.0}, "", "more than 300 s"),
        ({"rule_after": 0.49}, "", "the rule-based score fell"),
        ({"junk_after": 0.015}, "", "1.50% of the pixels are junk"),
        (
            {"metrics": {"b": {"reward_before": 0.1, "reward_after": 0.2, "reward_gain": 0.1, "reward_gain_se": 0.06}}},
            "",
            "no further scorer rose",
        ),
        ({"kind": "iteration"}, "", "does not end in an evaluation"),
        ({}, "samples.png", "samples.png is missing"),
        ({}, "heldout.png", "heldout.png is missing"),
        ({}, "transformer/weights.safetensors", "no tuned weights"),
    ],
)
def test_a_bad_run_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], without: str, message: str
) -> None:
    done = check(tmp_path, GOOD | change, without)
    assert done.returncode == 1
    assert message in done.stderr


def test_further_scorers_and_diversity_are_printed(tmp_path: Path) -> None:
    metrics = {"tiny:scorer_b": {"reward_before": 0.1, "reward_after": 0.2, "reward_gain": 0.1, "reward_gain_se": 0.01}}
    diversity = {"pixels": {"diversity_before": 0.4, "diversity_after": 0.3}}
    done = check(tmp_path, {**GOOD, "metrics": metrics, "diversity": diversity})
    assert done.returncode == 0
    assert "tiny:scorer_b, reward: 0.1000 -> 0.2000" in done.stdout
    assert "pixels, diversity: 0.4000 -> 0.3000" in done.stdout


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    assert "did not run to its end" in check(tmp_path, None).stderr
