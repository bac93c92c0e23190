"""Trainings of equal CPU time with M plans a rollout, and what held-out prompts say of them; for variance.py."""

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
from trajsurgery.training.checkpoint import TrainingState, write_atomically
from trajsurgery.training.components import PromptCache, hinge_threshold, load, pipeline_arguments
from trajsurgery.training.recipe import Recipe, presets
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
"""Of an iteration, relative to one shared plan, by the seconds of CPU of a gradient: rates are scaled by them."""


@dataclass(frozen=True)
class Trainings:
    """Each configuration once a seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    budget: float = 40.0
    """Seconds of CPU in iterations; evaluations are not counted."""
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    """Tried with one shared plan on validation prompts; each method takes the one with the highest reward there. With
    more plans it is multiplied by an iteration's cost, so that all go as far in equal time: AdamW's steps have one
    length, and there are fewer of them."""
    validation: int = 100
    """The seed on which rates are tried."""
    images: int = 320
    """Held out, from the same noise for every configuration of a seed."""


def training_recipe(options: Trainings, method: str, configuration: str, seed: int, rate: float) -> Recipe:
    """The method's recipe on the embedded Flux, without averaging: 40 seconds are too short for it."""
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
    """One run: its curve, and what its images are given afterwards."""
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
    after = evaluate(chosen, world)
    correct = None if after.correct is None else after.correct.float().tolist()
    return {
        "curve": curve,
        "clock": clock,
        "reward": after.reward.tolist(),
        "rule": correct,
        "rate": chosen.optimiser.rate,
    }


def evaluate_untuned(options: Trainings, seed: int) -> dict[str, Any]:
    """The rewards of a seed's images before any training."""
    torch.set_num_threads(1)
    chosen = training_recipe(options, "leapalign", "shared 1", seed, options.rates[0])
    found = evaluate(chosen, load(chosen))
    return {"reward": found.reward.tolist(), "rule": None if found.correct is None else found.correct.float().tolist()}


def load_or_make(path: Path, make: bool, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What a file holds, made now if it is not there; None if it is not to be made."""
    if not path.exists():
        if not make:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        held = run()
        write_atomically(path, lambda partial: torch.save(held, partial))
        print(path.name, flush=True)
    return torch.load(path)


def compare_rewards(options: Trainings, methods: Sequence[str], runs: Path, make: bool) -> dict[str, Any] | None:
    """Runs what is missing of these methods, if it is to be made; the table, or None where parts are missing still."""
    folder = runs / f"rewards_{options.budget:g}_{options.images}"
    before = [
        load_or_make(folder / f"untuned_{seed}.pt", make, lambda seed=seed: evaluate_untuned(options, seed))
        for seed in options.seeds
    ]
    found: dict[str, Any] = {"budget": options.budget, "seeds": list(options.seeds), "images": options.images}
    for method in METHODS:

        def run(name: str, seed: int, rate: float, method: str = method) -> dict[str, Any] | None:
            path = folder / f"{method}_{name.replace(' ', '_')}_{rate:g}_{seed}.pt"
            return load_or_make(
                path, make and method in methods, lambda: train_and_evaluate(options, method, name, seed, rate)
            )

        tried = {rate: run("shared 1", options.validation, rate) for rate in options.rates}
        means = {rate: sum(t["reward"]) / len(t["reward"]) for rate, t in tried.items() if t is not None}
        if len(means) < len(options.rates):
            continue
        rate = max(means, key=means.__getitem__)
        after = {name: [run(name, seed, rate) for seed in options.seeds] for name in CONFIGURATIONS[method]}
        if None in before or any(None in runs for runs in after.values()):
            continue
        lines = {name: paired_gains(before, runs, after["shared 1"]) for name, runs in after.items()}
        found[method] = {"rates": {f"{r:g}": round(mean, 5) for r, mean in means.items()}, "rate": rate, "plans": lines}
    return found if set(METHODS) <= set(found) else None


def paired_gains(
    before: list[dict[str, Any]], after: list[dict[str, Any]], first: list[dict[str, Any]]
) -> dict[str, Any]:
    """Gains over the untuned model and over one shared plan, paired: means and 95% intervals over seeds."""
    found: dict[str, Any] = {
        "rate": after[0]["rate"],
        "iterations": [len(run["curve"]) for run in after],
        "clock": [round(run["clock"], 1) for run in after],
    }
    for what in ("reward", "rule"):
        for name, other in (("gain", before), ("over_one", first)):
            apart = [_mean(a[what]) - _mean(b[what]) for a, b in zip(after, other)]
            found[f"{what}_{name}"] = {**interval(apart).to_dict(), "by seed": apart}
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
