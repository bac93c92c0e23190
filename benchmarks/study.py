"""Table 2 on the embedded world: every direct-gradient method under one budget, on five seeds.

    python benchmarks/study.py

Each method gets the same iterations, batch and optimiser; its learning rate is chosen once, by the reward on validation
prompts and a seed of their own, from the grid that all share (and extended by a step where the best lies at its edge).
Then it runs on every seed, with the prompts and noise that all methods of a seed share, and its held-out images are
graded by the reward, two further scorers and the rules, paired with the untuned model's image by image. Writes
study.json, study.md and study.png beside this file, from as many whole seeds as there are. Runs that are finished are
read, not repeated, and one that was interrupted goes on: after any interruption the same command continues.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro
from study_pool import do
from study_runs import Task, finished, scores

from trajsurgery import methods
from trajsurgery.recipe import Method, presets

HERE = Path(__file__).parent
METHODS: dict[str, Method] = {
    "refl": methods.ReFL(),
    "draft_lv": methods.DRaFTLV(),
    "drtune": methods.DRTune(),
    "leapalign": methods.LeapAlign(),
    "flowbp_sparse": methods.FlowBPSparse(),
    "flowbp_bridge": methods.FlowBPBridge(),
    "flowbp_lagrange": methods.FlowBPLagrange(),
}
GRID = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
"""The learning rates that may be tried; `Options.rates` are tried for all."""


@dataclass(frozen=True)
class Options:
    """Which methods, on which seeds, under which budget."""

    methods: tuple[str, ...] = tuple(METHODS)
    """In the table's order."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    """The learning rates of the grid's middle, tried with every method."""
    validation: int = 100
    """The seed on which the rate is chosen."""
    chosen: Path | None = None
    """A study.json whose rates are taken instead of choosing them."""
    stages: tuple[int, ...] = (75, 150, 225)
    """Iterations after which held-out images are made (Fig. 5); the last is the budget."""
    images: int = 480
    """Held-out images of a run, spread evenly over the six categories."""
    workers: int = 2
    """Processes side by side, one thread each; 1 on a busy machine."""
    report: bool = False
    """Only write the table and pictures of what is finished."""
    output: Path = HERE
    runs: Path = Path("outputs/study")
    """Where the runs themselves are; keep it to go on."""


def task(options: Options, method: Method, rate: float, seed: int, split: str, folder: Path) -> Task:
    """A run of a method; with split "validation" its last stage alone is graded."""
    chosen = presets(method, "")["tiny"]
    recipe = replace(
        chosen,
        optimiser=replace(chosen.optimiser, rate=rate),
        evaluation=replace(chosen.evaluation, images=options.images, pictures=24, split=split),
        iterations=options.stages[-1],
        seed=seed,
        threads=1,
        output=options.runs / folder,
    )
    return Task(recipe, options.stages if split == "heldout" else options.stages[-1:])


def base(options: Options, seed: int, split: str) -> Task:
    """The untuned model's images of a seed, which all methods share."""
    made = task(options, METHODS["refl"], GRID[0], seed, split, Path("base") / f"{split}_{seed}")
    return Task(made.recipe, (0,))


def trial(options: Options, name: str, rate: float) -> Task:
    """A method's run on the validation seed."""
    folder = Path("rates") / name / f"{rate:g}"
    return task(options, METHODS[name], rate, options.validation, "validation", folder)


def tried(options: Options, name: str) -> dict[float, float]:
    """Rate: mean reward on the validation prompts, for the runs that are finished."""
    tasks = {rate: trial(options, name, rate) for rate in GRID}
    last = options.stages[-1]
    return {rate: float(scores(t.folder, last).reward.mean()) for rate, t in tasks.items() if finished(t)}


def wanted(found: dict[float, float], rates: tuple[float, ...]) -> tuple[float, ...]:
    """The rates to try: those of the middle, and the next of the grid where the best of all tried lies at an edge."""
    if set(rates) - found.keys():
        return rates
    best, (low, high) = max(found, key=found.__getitem__), (min(found), max(found))
    place = GRID.index(best)
    beyond = [GRID[place - 1]] if best == low and place else []
    beyond += [GRID[place + 1]] if best == high and place + 1 < len(GRID) else []
    return tuple(sorted({*found, *beyond}))


def rate(options: Options, name: str) -> float | None:
    """The rate chosen for a method; None while it is being chosen."""
    if options.chosen is not None:
        import json

        return float(json.loads(options.chosen.read_text())["rates"][name]["chosen"])
    found = tried(options, name)
    return None if set(wanted(found, options.rates)) - found.keys() else max(found, key=found.__getitem__)


def plan(options: Options) -> list[Task]:
    """Rates first, then one seed after the other with all methods, so that what is there is balanced at any time."""
    rates = {name: rate(options, name) for name in options.methods}
    return [*_trials(options), *_seeds(options, rates)]


def _trials(options: Options) -> Iterator[Task]:
    if options.chosen is None:
        yield base(options, options.validation, "validation")
        found = {name: tried(options, name) for name in options.methods}
        for value in GRID:
            for name in options.methods:
                if value in wanted(found[name], options.rates):
                    yield trial(options, name, value)


def _seeds(options: Options, rates: dict[str, float | None]) -> Iterator[Task]:
    for seed in options.seeds:
        yield base(options, seed, "heldout")
        for name in options.methods:
            value = rates[name]
            if value is not None:
                yield task(options, METHODS[name], value, seed, "heldout", Path("seeds") / name / str(seed))


def said(options: Options, done: Task) -> str:
    """A line about a finished run."""
    last = scores(done.folder, done.stages[-1])
    assert last.correct is not None, "the embedded world has rules"
    return f"reward {float(last.reward.mean()):.4f} rules {float(last.correct.float().mean()):.3f}"


def main(options: Options) -> int:
    """Runs what is left, then writes what there is."""
    complete = options.report or do(lambda: plan(options), options.workers, lambda done: said(options, done))
    return 0 if complete else 130


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
