"""Trainings of equal CPU time with M plans a rollout, and what held-out prompts say of them; for variance.py."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trajsurgery.checkpoint import Training
from trajsurgery.heldout import evaluate
from trajsurgery.methods import DRTune, LeapAlign
from trajsurgery.recipe import Recipe, presets
from trajsurgery.train import iterate
from trajsurgery.world import Embeddings, call_of, load, threshold

METHODS: dict[str, Any] = {"leapalign": LeapAlign(alpha=0.3), "drtune": DRTune(connected=True)}
CONFIGURATIONS = {
    "leapalign": ("shared 1", "shared 2", "shared 4", "shared 8", "per-sample 1"),
    "drtune": ("shared 1", "shared 2", "shared 4", "shared 8"),
}
COSTS = {"leapalign": {"shared 2": 1.2, "shared 4": 1.4, "shared 8": 2.0, "per-sample 1": 1.05}, "drtune": {
    "shared 2": 1.1, "shared 4": 1.3, "shared 8": 1.7}}  # fmt: skip
"""Of an iteration, relative to one shared plan, roughly: rates are scaled by them."""


@dataclass(frozen=True)
class Trainings:
    """Each configuration once a seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    budget: float = 40.0
    """Seconds of CPU in iterations; evaluations are not counted."""
    rate: float = 1e-4
    """With one shared plan. With more it is multiplied by an iteration's cost, so that all go as far in equal time:
    AdamW's steps have one length, and there are fewer of them. Chosen on validation prompts, which choose nothing
    else."""
    images: int = 320
    """Held out, from the same noise for every configuration of a seed."""
    split: str = "heldout"
    configurations: tuple[str, ...] | None = None
    """All if left out."""


def recipe(options: Trainings, method: str, configuration: str, seed: int) -> Recipe:
    """The method's recipe on the embedded Flux, without averaging: 40 seconds are too short for it."""
    kind, plans = configuration.rsplit(" ", 1)
    chosen = presets(METHODS[method], "")["tiny"]
    rate = options.rate * COSTS[method].get(configuration, 1.0)
    memory = "retain" if configuration == "shared 1" else "recompute"
    return replace(
        chosen,
        seed=seed,
        rollout=replace(chosen.rollout, plans=int(plans), times=kind, memory=memory),
        optimiser=replace(chosen.optimiser, rate=rate),
        evaluation=replace(chosen.evaluation, images=options.images, pictures=1, split=options.split, metrics=()),
    )


def trained(options: Trainings, method: str, configuration: str, seed: int) -> dict[str, Any]:
    """One run: the rewards of its images, before and after where it is the seed's first."""
    torch.set_num_threads(1)
    chosen = recipe(options, method, configuration, seed)
    world = load(chosen)
    embeddings = Embeddings(world.pipe, world.texts, call_of(chosen))
    training, lambda_ = Training.start(chosen, world.module), threshold(chosen, world)
    curve, spent, clock = list[tuple[float, float]](), 0.0, 0.0
    while spent < options.budget:
        cpu, began = time.process_time(), time.perf_counter()
        record = iterate(chosen, world, embeddings, training, lambda_)
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


def untuned(options: Trainings, seed: int) -> dict[str, Any]:
    """The rewards of a seed's images before any training."""
    torch.set_num_threads(1)
    chosen = recipe(options, "leapalign", "shared 1", seed)
    found = evaluate(chosen, load(chosen))
    return {"reward": found.reward.tolist(), "rule": None if found.correct is None else found.correct.float().tolist()}


def rewards(options: Trainings, methods: Sequence[str], runs: Path, make: bool) -> dict[str, Any] | None:
    """Runs what is missing, if it is to be made; the table, or None where parts of it are missing still."""
    folder = runs / f"{options.split}_{options.rate:g}_{options.budget:g}"
    for seed in options.seeds:
        todo = {folder / f"untuned_{seed}.pt": lambda seed=seed: untuned(options, seed)}
        for method in methods:
            for name in options.configurations or CONFIGURATIONS[method]:
                path = folder / f"{method}_{name.replace(' ', '_')}_{seed}.pt"
                todo[path] = lambda method=method, name=name, seed=seed: trained(options, method, name, seed)
        for path, run in todo.items():
            if make and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(run(), path)
                print(path.name, flush=True)
    if not all((folder / f"untuned_{seed}.pt").exists() for seed in options.seeds):
        return None
    before = [torch.load(folder / f"untuned_{seed}.pt") for seed in options.seeds]
    found: dict[str, Any] = {"budget": options.budget, "seeds": list(options.seeds), "images": options.images}
    for method in METHODS:
        lines, first = dict[str, Any](), None
        for name in options.configurations or CONFIGURATIONS[method]:
            paths = [folder / f"{method}_{name.replace(' ', '_')}_{seed}.pt" for seed in options.seeds]
            if not all(path.exists() for path in paths):
                return None
            after = [torch.load(path) for path in paths]
            first = first or after
            lines[name] = line(before, after, first)
        found[method] = lines
    return found


def line(before: list[dict[str, Any]], after: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Gains over the untuned model and over one shared plan: mean over images and seeds, paired standard errors."""
    found: dict[str, Any] = {
        "rate": after[0]["rate"],
        "iterations": [len(run["curve"]) for run in after],
        "clock": [round(run["clock"], 1) for run in after],
    }
    for what in ("reward", "rule"):
        found[f"{what}_gain"], found[f"{what}_gain_se"] = paired(after, before, what)
        found[f"{what}_over_one"], found[f"{what}_over_one_se"] = paired(after, first, what)
        found[f"{what}_gain_by_seed"] = [paired([a], [b], what)[0] for a, b in zip(after, before)]
    found["curve"] = [[*point] for point in zip(*map(list, zip(*after[0]["curve"])))]
    return found


def paired(a: list[dict[str, Any]], b: list[dict[str, Any]], what: str) -> tuple[float, float]:
    """The mean difference and its standard error over images and seeds."""
    apart: Tensor = torch.cat([torch.tensor(x[what]) - torch.tensor(y[what]) for x, y in zip(a, b)])
    return round(float(apart.mean()), 5), round(float(apart.std()) / math.sqrt(len(apart)), 5)
