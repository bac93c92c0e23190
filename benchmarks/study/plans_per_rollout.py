"""When do M plans a rollout pay? The variances of `variance.py`, with an iteration's time as of a large model.

    python -m benchmarks.study.plans_per_rollout

No training is run: it takes the measured variance of the gradient for M plans (variance.json) and multiplies it by the
time (rollout + M * plan) / (rollout + plan), in seconds of FLUX.1-dev on an H100 (2.5 and 0.85, issue 16). M plans pay
where the product is below 1. Without the measurement: plans divide the part of the variance that comes from the times
by M, so that M pay where that part's share of the variance exceeds `share_that_pays`. Writes plans_per_rollout.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.provenance import provenance

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Seconds of a large model."""

    rollout: float = 2.5
    """Of a rollout with its decode and reward."""
    plan: float = 0.85
    """Of one plan on it: its model calls with gradient, made after the rollout."""
    variances: Path = RESULTS / "variance.json"
    output: Path = RESULTS


def relative_time(rollout: float, plan: float, count: int) -> float:
    """Return the time of an iteration with so many plans over that of one plan."""
    return (rollout + count * plan) / (rollout + plan)


def share_that_pays(rollout: float, plan: float, count: int) -> float:
    """Return the share of the times in the variance above which so many plans (2 or more) pay; above 1: never."""
    return (1 - 1 / relative_time(rollout, plan, count)) / (1 - 1 / count)


def price(gradients: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return {M: time, variance times time, its 95% interval, and the share that pays} of one method's measurement."""
    seconds, one = gradients["seconds"], gradients["plans"]["shared 1"]["variance"]
    rows: dict[str, Any] = {}
    for name, row in gradients["plans"].items():
        kind, count = name.rsplit(" ", 1)
        if kind != "shared" or count == "1":
            continue
        time = relative_time(options.rollout, options.plan, int(count))
        measured = relative_time(seconds["rollout"]["cpu"], seconds["shared"]["cpu"], int(count))
        rows[count] = {
            "time": round(time, 3),
            "variance_by_time": round(row["variance"] / one * time, 3),
            "interval": [round(bound * time / measured, 2) for bound in row["variance_by_time_interval"]],
            "share_that_pays": round(share_that_pays(options.rollout, options.plan, int(count)), 3),
        }
    times, rest = (gradients["parts"][name]["variance"] for name in ("of the times", "of prompts and noise"))
    return {"share_of_the_times": round(times / (times + rest), 3), "plans": rows}


def main(options: Options) -> None:
    """Price the measured variances, write and print."""
    measured = json.loads(options.variances.read_text())["gradients"]
    seconds = {"rollout": options.rollout, "plan": options.plan}
    methods = {method: price(gradients, options) for method, gradients in measured.items()}
    record = {**provenance(), "seconds": seconds, "methods": methods}
    (options.output / "plans_per_rollout.json").write_text(json.dumps(record, indent=1) + "\n")
    for method, priced in methods.items():
        print(f"{method}: {priced['share_of_the_times']:.0%} of the variance comes from the times")
        for count, row in priced["plans"].items():
            print(f"  {count} plans: {row}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
