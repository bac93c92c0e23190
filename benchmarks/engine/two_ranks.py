"""The demo trained by two processes: does the held-out reward rise as in one?

    python -m benchmarks.engine.two_ranks

Runs `torchrun --nproc_per_node 2 recipes/leapalign_flux.py` with --shard ddp, then fsdp, to the end (no GPU: gloo,
one thread a process); finished or interrupted runs in outputs/ go on. Writes two_ranks.json to results/. Fails if the
reward does not rise by `check_demo.STANDARD_ERRORS` paired standard errors, or the pictures are worse by check_demo's
other signs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.demo.check_demo import STANDARD_ERRORS, failed_quality_checks, read_evaluation
from benchmarks.provenance import provenance

KEYS = ("reward_before", "reward_after", "reward_gain", "reward_gain_se", "rule_before", "rule_after", "junk_after")


@dataclass(frozen=True)
class Options:
    """Where the runs and the figures go."""

    runs: Path = Path("outputs")
    output: Path = Path(__file__).parent / "results"
    trained_at: str = "this commit"
    """Where runs that were finished before were trained."""


def command(shard: str, folder: Path) -> list[str]:
    """Return the command of a run."""
    launch = ["torchrun", "--nproc_per_node", "2", "recipes/leapalign_flux.py"]
    return [*launch, "--shard", shard, "--output", str(folder)]


def figures(folder: Path) -> dict[str, Any]:
    """Return a finished run's held-out figures and seconds."""
    evaluation = read_evaluation(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["kind"] == "iteration"]
    others = {name: {key: line[key] for key in KEYS[:4]} for name, line in evaluation["metrics"].items()}
    return {
        **{key: evaluation[key] for key in KEYS},
        "metrics": others,
        "iterations": len(seconds),
        "seconds_an_iteration": {
            "median": statistics.median(seconds),
            "quartiles": statistics.quantiles(seconds, n=4)[::2],
        },
        "seconds": evaluation["seconds"],
    }


def failures(result: dict[str, Any]) -> list[str]:
    """Return what a run does not reach."""
    gain, error = result["reward_gain"], result["reward_gain_se"]
    low = (
        [] if gain > STANDARD_ERRORS * error else [f"the reward rose by {gain:.4f}, {gain / error:.1f} standard errors"]
    )
    return [*low, *failed_quality_checks(result)]


def main(options: Options) -> int:
    """Run both ways, write the figures, and return 1 if one fails."""
    record, failed = {**provenance(), "trained_at": options.trained_at}, False
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for shard in ("ddp", "fsdp"):
        folder = options.runs / f"two_ranks_{shard}"
        launch = command(shard, folder)
        module = [sys.executable, "-m", "torch.distributed.run", *launch[1:]]
        subprocess.run(module, check=True, env=environment)
        result = figures(folder)
        record[shard] = {"command": " ".join(launch), **result}
        print(f"{shard}: reward {result['reward_before']:.4f} -> {result['reward_after']:.4f}")
        for line in failures(result):
            failed = True
            print(f"{shard}: {line}", file=sys.stderr)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "two_ranks.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
