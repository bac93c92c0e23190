"""Cost of planning against the size of the plan: draw, check, compile, count.

    python -m benchmarks.engine.scaling

draw: a method's `draw(steps)`. check: the plan built from its nodes and held against every rule. compile: bound to a
trajectory and made ready to run (`Execution`). count: the closed form at the sampler's times, its terms counted, 100 of
them listed. LeapAlign's plans have one size for all T; the whole trajectory's grow with T. Times are of the processor,
which other processes do not lengthen, on newly made nodes. Writes scaling.json and scaling.png to results/. Fails if
LeapAlign takes `MAX_SECONDS`, or the exponent exceeds `MAX_EXPONENT`.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.provenance import provenance
from trajsurgery import LeapAlign, Plan, latent
from trajsurgery.plans.plan import _prepared as prepared
from trajsurgery.surgery.execution import Execution
from trajsurgery.surgery.trajectory import Trajectory

MAX_SECONDS = 0.005
"""Limit for all of LeapAlign's planning."""
MAX_EXPONENT = 1.3
"""The largest exponent that counts as near-linear."""


@dataclass(frozen=True)
class Options:
    """Sizes of the plans, and repeats."""

    nodes: tuple[int, ...] = (31, 61, 121, 241, 481, 1000)
    """Approximate sizes of whole-trajectory plans, three nodes a step."""
    repeats: int = 30
    output: Path = Path(__file__).parent / "results"


def whole_trajectory(steps: int) -> Plan:
    """Return a plan with a leap and a discount at every step: three nodes each."""
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.leap(t - 1, discount=0.5)
    return Plan(x, steps=steps)


def zero_trajectory(steps: int) -> Trajectory:
    """Return a trajectory with every latent and velocity recorded, of one element each."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    latents = {t: torch.zeros(1, 1) for t in range(steps + 1)}
    velocities = {t: torch.zeros(1, 1) for t in range(1, steps + 1)}
    return Trajectory(sigmas, latents, velocities)


def time_call(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds of a call, and its result."""
    began = time.process_time()
    result = run()
    return time.process_time() - began, result


def time_planning(draw: Callable[[int], Plan], steps: int, recorded: Trajectory) -> tuple[dict[str, float], Plan]:
    """Time one pass through planning.

    `draw` checks as it builds, so "check" is a part of it, shown separately.
    """
    seconds: dict[str, float] = {}
    seconds["draw"], plan = time_call(lambda: draw(steps))
    seconds["check"], _ = time_call(lambda: Plan(*plan.outputs, steps=steps))
    seconds["compile"], _ = time_call(lambda: Execution(plan, recorded))
    sigmas = recorded.sigmas.tolist()
    seconds["count"], _ = time_call(lambda: plan.gradient(sigmas, limit=100))
    seconds["all"] = seconds["draw"] + seconds["compile"] + seconds["count"]
    return seconds, plan


def measure_plans(draw: Callable[[int], Plan], steps: int, repeats: int) -> dict[str, Any]:
    """Return medians and quartiles of each part."""
    recorded = zero_trajectory(steps)
    time_planning(draw, steps, recorded)
    seconds_by_part: dict[str, list[float]] = {}
    size = 0
    for _ in range(repeats):
        prepared.cache_clear()  # it would keep the last plan, and with it all nodes
        gc.collect()
        seconds, plan = time_planning(draw, steps, recorded)
        size = len(plan.nodes)
        for name, value in seconds.items():
            seconds_by_part.setdefault(name, []).append(value)
        del plan
    parts = {
        name: {"median": statistics.median(values), "quartiles": statistics.quantiles(values, n=4)[::2]}
        for name, values in seconds_by_part.items()
    }
    return {"steps": steps, "nodes": size, "seconds": parts}


def growth_exponent(points: list[dict[str, Any]], part: str) -> float:
    """Return the slope of log seconds on log nodes over the larger half of the sizes."""
    last = points[len(points) // 2 - 1 :]
    x = [math.log(point["nodes"]) for point in last]
    y = [math.log(point["seconds"][part]["median"]) for point in last]
    return statistics.linear_regression(x, y).slope


def measure(options: Options) -> dict[str, Any]:
    """Measure LeapAlign's plans and whole-trajectory plans."""
    generator = torch.Generator().manual_seed(0)
    leapalign = [measure_plans(lambda t: LeapAlign().draw(t, generator), t, options.repeats) for t in (25, 50, 100)]
    sizes = [measure_plans(whole_trajectory, round((n - 1) / 3), options.repeats) for n in options.nodes]
    return {
        "repeats": options.repeats,
        "leapalign": leapalign,
        "whole_trajectory": sizes,
        "exponents": {part: growth_exponent(sizes, part) for part in sizes[0]["seconds"]},
    }


def draw_picture(record: dict[str, Any], path: Path) -> None:
    """Draw milliseconds against nodes, both logarithmic, a line for each part."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours = {"draw": "#0b6e99", "check": "#3c9a5f", "compile": "#b9770e", "count": "#8e44ad", "all": "#20262d"}
    points = record["whole_trajectory"]
    nodes = [point["nodes"] for point in points]
    for part, colour in colours.items():
        part_seconds = [point["seconds"][part] for point in points]
        label = {"draw": "draw (with check)", "all": "draw + compile + count"}.get(part, part)
        middle = [1e3 * value["median"] for value in part_seconds]
        low, high = ([1e3 * value["quartiles"][i] for value in part_seconds] for i in (0, 1))
        axes.plot(nodes, middle, "o-", color=colour, ms=4, label=f"{label}: nodes^{record['exponents'][part]:.2f}")
        axes.fill_between(nodes, low, high, color=colour, alpha=0.2, linewidth=0)
    leapalign = record["leapalign"]
    total = [1e3 * point["seconds"]["all"]["median"] for point in leapalign]
    axes.plot([point["nodes"] for point in leapalign], total, "*", color="#c8321f", ms=13, label="LeapAlign, all of it")
    axes.axhline(1e3 * MAX_SECONDS, color="#c8321f", lw=0.8, ls="--")
    axes.text(
        nodes[-1], 1e3 * MAX_SECONDS * 1.06, "5 ms, promised for LeapAlign", color="#c8321f", ha="right", fontsize=8
    )
    axes.set(xscale="log", yscale="log", xlabel="nodes of the plan", ylabel="milliseconds of the processor")
    axes.set_title("Planning: whole-trajectory plans, medians and quartiles", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(options: Options) -> int:
    """Measure, write, and return 1 if a limit is exceeded."""
    torch.set_num_threads(1)
    record = {**provenance(), **measure(options)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_picture(record, options.output / "scaling.png")
    for point in [*record["leapalign"], *record["whole_trajectory"]]:
        parts = {name: f"{1e3 * value['median']:.2f}" for name, value in point["seconds"].items()}
        print(f"T = {point['steps']}, {point['nodes']} nodes, milliseconds: {parts}")
    exponents = {part: round(value, 2) for part, value in record["exponents"].items()}
    print(f"exponents: {exponents}")
    slowest = max(point["seconds"]["all"]["median"] for point in record["leapalign"])
    within_limits = slowest < MAX_SECONDS and record["exponents"]["all"] <= MAX_EXPONENT
    print(
        f"LeapAlign below {MAX_SECONDS} s, exponent at most {MAX_EXPONENT}: {'kept' if within_limits else 'NOT kept'}"
    )
    return 0 if within_limits else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
