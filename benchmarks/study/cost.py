"""Time and peak memory of an iteration of every method of the study, measured side by side.

    python -m benchmarks.study.cost

A process for each method (and for LeapAlign with one and three leaps, Fig. 4b), one thread each; they take turns, one
iteration at a time, in an order that is reversed every round, so that other work on the machine slows all of them
alike. Seconds are the median of an iteration's wall clock, with the quartiles, and of its processor time. Peaks are the
bytes of tensors alive at once in an iteration, counted storage by storage, above weights, gradients and moments, in
those iterations of a run whose plans call the model most often. Writes results/study_cost.json. About six minutes on a
quiet machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro

from benchmarks.engine.overhead import PeakMemory
from benchmarks.provenance import provenance
from benchmarks.study.methods import METHODS
from trajsurgery.methods import LeapAlign
from trajsurgery.plans.nodes import Velocity
from trajsurgery.training import components
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.training_loop import iteration_generator, training_step

MEASURED: dict[str, Method] = {**METHODS, "leaps 1": LeapAlign(leaps=1), "leaps 3": LeapAlign(leaps=3)}


@dataclass(frozen=True)
class Options:
    """Methods, and how long to measure."""

    methods: tuple[str, ...] = tuple(MEASURED)
    rounds: int = 16
    """Iterations of each method; the draws of a round are the same for all methods."""
    peaks: int = 4
    """Iterations whose tensors are counted."""
    output: Path = Path(__file__).parent / "results"


def heaviest_iterations(recipe: Recipe, count: int) -> list[int]:
    """Return the iterations whose plans call the model most often: memory depends on the times drawn."""
    numbers = range(1, recipe.iterations + 1)
    plans = {n: recipe.method.draw(recipe.rollout.steps, iteration_generator(recipe.seed, n, "plan")) for n in numbers}
    calls = {n: sum(isinstance(node, Velocity) for node in plan.nodes) for n, plan in plans.items()}
    return sorted(calls, key=lambda n: -calls[n])[:count]


def serve_iterations(recipe: Recipe, peaks: int, connection: Connection) -> None:
    """Run in a method's process: send the peak bytes, then the times of one iteration for each True received."""
    torch.set_num_threads(1)
    run = components.load(recipe)
    training, embeddings = TrainingState.start(recipe, run.module), components.PromptCache(run.pipe, run.texts)
    limit = components.hinge_threshold(recipe, run)
    training_step(recipe, run, embeddings, training, limit)  # the optimiser's moments are made in the first
    most = 0
    for number in heaviest_iterations(recipe, peaks):
        training.iteration = number - 1
        with PeakMemory() as mode:
            training_step(recipe, run, embeddings, training, limit)
        most = max(most, mode.most)
    training.iteration = 1
    connection.send(most)
    while connection.recv():
        began, worked = time.perf_counter(), time.process_time()
        training_step(recipe, run, embeddings, training, limit)
        connection.send((time.perf_counter() - began, time.process_time() - worked))


def measure(recipes: Mapping[str, Recipe], rounds: int, peaks: int) -> dict[str, Any]:
    """Return {name: seconds, processor seconds and peak bytes of an iteration}."""
    context, connections = multiprocessing.get_context("spawn"), dict[str, Any]()
    peak_bytes: dict[str, int] = {}
    for name, recipe in recipes.items():
        parent, child = context.Pipe()
        context.Process(target=serve_iterations, args=(recipe, peaks, child), daemon=True).start()
        child.close()
        connections[name], peak_bytes[name] = parent, parent.recv()
        print(f"{name}: {peak_bytes[name] / 2**20:.1f} MiB", flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in recipes}
    for turn in range(rounds):
        for name in list(recipes) if turn % 2 else list(reversed(recipes)):
            connections[name].send(True)
            times[name].append(connections[name].recv())
        print(f"round {turn + 1} of {rounds}", flush=True)
    for connection in connections.values():
        connection.send(False)
    return {
        name: {
            "peak_bytes": peak_bytes[name],
            "seconds": quartiles([wall for wall, _ in pairs]),
            "processor_seconds": quartiles([work for _, work in pairs]),
        }
        for name, pairs in times.items()
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and both quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"low": round(low, 4), "median": round(middle, 4), "high": round(high, 4)}


def main(options: Options) -> int:
    """Measure and write."""
    record = provenance()
    if record["load"] > 0.3:
        print(f"the machine is busy (load {record['load']}): seconds say little, processor seconds and bytes hold")
    recipes = {name: presets(MEASURED[name], "")["tiny"] for name in options.methods}
    record["rounds"] = options.rounds
    record["methods"] = measure(recipes, options.rounds, options.peaks)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "study_cost.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, line in record["methods"].items():
        medians = " ".join(f"{key} {line[key]['median']:.3f}" for key in ("seconds", "processor_seconds"))
        print(f"{name:16} {medians} peak {line['peak_bytes'] / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
