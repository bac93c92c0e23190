"""Trainings of equal CPU time with M plans per rollout, and their held-out rewards; for variance.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.seed_statistics import interval
from trajsurgery.evaluation.held_out import evaluate
from trajsurgery.methods import DRTune, LeapAlign
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache, hinge_threshold, load, pipeline_arguments
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import training_step

METHODS: dict[str, Any] = {"leapalign": LeapAlign(alpha=0.3), "drtune": DRTune(connected=True)}
CONFIGURATIONS = {
    "leapalign": ("shared 1", "shared 2", "shared 4", "shared 8", "per-sample 1"),
    "drtune": ("shared 1", "shared 2", "shared 4", "shared 8"),
}
COSTS = {
    "leapalign": {"shared 2": 1.16, "shared 4": 1.47, "shared 8": 2.1, "per-sample 1": 1.05},
    "drtune": {"shared 2": 1.13, "shared 4": 1.4, "shared 8": 1.95},
}
"""CPU seconds of an iteration relative to one shared plan, by which rates are scaled."""


@dataclass(frozen=True)
class Trainings:
    """Each configuration once per seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    budget: float = 40.0
    """CPU seconds of iterations; evaluations are not counted."""
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    """Tried with one shared plan on validation prompts; each method takes the one with the highest reward.

    With more plans it is multiplied by an iteration's cost, so that all go equally far in equal time: AdamW's steps
    have one length, and there are fewer of them.
    """
    validation: int = 100
    """The seed on which rates are tried."""
    images: int = 320
    """Held-out images, from the same noise for every configuration of a seed."""


def training_recipe(options: Trainings, method: str, configuration: str, seed: int, rate: float) -> Recipe:
    """Return the method's recipe on the embedded Flux, without averaging: 40 seconds are too short for it."""
    kind, plans = configuration.rsplit(" ", 1)
    chosen = presets(METHODS[method], "")["tiny"]
    split = "validation" if seed == options.validation else "heldout"
    memory = "retain" if configuration == "shared 1" else "recompute"
    return replace(
        chosen,
        seed=seed,
        rollout=replace(chosen.rollout, plans=int(plans), times=kind, memory=memory),
        optimiser=replace(chosen.optimiser, rate=rate * COSTS[method].get(configuration, 1.0)),
        evaluation=replace(chosen.evaluation, images=options.images, pictures=1, split=split, metrics=()),
    )


def train_and_evaluate(options: Trainings, method: str, configuration: str, seed: int, rate: float) -> dict[str, Any]:
    """Train once; return the training curve and the held-out scores."""
    torch.set_num_threads(1)
    chosen = training_recipe(options, method, configuration, seed, rate)
    world = load(chosen)
    embeddings = PromptCache(world.pipe, world.texts, pipeline_arguments(chosen))
    training, lambda_ = TrainingState.start(chosen, world.module), hinge_threshold(chosen, world)
    curve, spent, clock = list[tuple[float, float]](), 0.0, 0.0
    while spent < options.budget:
        cpu, began = time.process_time(), time.perf_counter()
        record = training_step(chosen, world, embeddings, training, lambda_)
        spent, clock = spent + time.process_time() - cpu, clock + time.perf_counter() - began
        curve.append((round(spent, 2), record.reward))
    scores = evaluate(chosen, world)
    correct = None if scores.correct is None else scores.correct.float().tolist()
    return {
        "curve": curve,
        "clock": clock,
        "reward": scores.reward.tolist(),
        "rule": correct,
        "rate": chosen.optimiser.rate,
    }


def evaluate_untuned(options: Trainings, seed: int) -> dict[str, Any]:
    """Return the held-out scores of a seed before any training."""
    torch.set_num_threads(1)
    chosen = training_recipe(options, "leapalign", "shared 1", seed, options.rates[0])
    scores = evaluate(chosen, load(chosen))
    return {
        "reward": scores.reward.tolist(),
        "rule": None if scores.correct is None else scores.correct.float().tolist(),
    }


def load_or_make(path: Path, make: bool, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Load a file, or make it if it does not exist; None if it does not exist and `make` is False."""
    if not path.exists():
        if not make:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        result = run()
        write_atomically(path, lambda partial: torch.save(result, partial))
        print(path.name, flush=True)
    return torch.load(path)


def compare_rewards(options: Trainings, methods: Sequence[str], runs: Path, make: bool) -> dict[str, Any] | None:
    """Train what is missing of these methods if `make`; return the table, or None while parts are missing."""
    folder = runs / f"rewards_{options.budget:g}_{options.images}"
    before = [
        load_or_make(folder / f"untuned_{seed}.pt", make, lambda seed=seed: evaluate_untuned(options, seed))
        for seed in options.seeds
    ]
    record: dict[str, Any] = {"budget": options.budget, "seeds": list(options.seeds), "images": options.images}
    for method in METHODS:

        def run(name: str, seed: int, rate: float, method: str = method) -> dict[str, Any] | None:
            path = folder / f"{method}_{name.replace(' ', '_')}_{rate:g}_{seed}.pt"
            return load_or_make(
                path, make and method in methods, lambda: train_and_evaluate(options, method, name, seed, rate)
            )

        trials = {rate: run("shared 1", options.validation, rate) for rate in options.rates}
        means = {rate: sum(t["reward"]) / len(t["reward"]) for rate, t in trials.items() if t is not None}
        if len(means) < len(options.rates):
            continue
        rate = max(means, key=means.__getitem__)
        after = {name: [run(name, seed, rate) for seed in options.seeds] for name in CONFIGURATIONS[method]}
        if None in before or any(None in runs for runs in after.values()):
            continue
        lines = {name: paired_gains(before, runs, after["shared 1"]) for name, runs in after.items()}
        record[method] = {
            "rates": {f"{r:g}": round(mean, 5) for r, mean in means.items()},
            "rate": rate,
            "plans": lines,
        }
    return record if set(METHODS) <= set(record) else None


def paired_gains(
    before: list[dict[str, Any]], after: list[dict[str, Any]], first: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return paired gains over the untuned model and over one shared plan: means and 95% intervals over seeds."""
    gains: dict[str, Any] = {
        "rate": after[0]["rate"],
        "iterations": [len(run["curve"]) for run in after],
        "clock": [round(run["clock"], 1) for run in after],
    }
    for figure in ("reward", "rule"):
        for name, other in (("gain", before), ("over_one", first)):
            differences = [_mean(a[figure]) - _mean(b[figure]) for a, b in zip(after, other)]
            gains[f"{figure}_{name}"] = {**interval(differences).to_dict(), "by seed": differences}
    return gains


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
