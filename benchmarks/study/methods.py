"""The study's methods, and the recipes of their runs, which differ in method and rate alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.study.runs import Task
from trajsurgery import methods
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Method, Recipe

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
"""The learning rates that may be tried."""

PICTURES = 24
"""Held-out images that a run stores as pictures."""

Split = Literal["heldout", "validation"]


@dataclass(frozen=True)
class Budget:
    """What all runs of a study have in common."""

    stages: tuple[int, ...]
    """Iterations after which held-out images are made; the last is the budget."""
    images: int
    """Held-out images of a run."""
    runs: Path
    """Folder of the runs."""

    def recipe(self, method: Method, rate: float, seed: int, split: Split, folder: Path) -> Recipe:
        """Return the recipe of a method on the embedded Flux, at a rate, on a seed."""
        chosen = presets(method, "")["tiny"]
        return replace(
            chosen,
            optimiser=replace(chosen.optimiser, rate=rate),
            evaluation=replace(chosen.evaluation, images=self.images, pictures=PICTURES, split=split),
            iterations=self.stages[-1],
            seed=seed,
            threads=1,
            output=self.runs / folder,
        )

    def base(self, seed: int, split: Split = "heldout") -> Task:
        """Return the task that makes a seed's images of the untuned model, which all methods share."""
        return Task(self.recipe(METHODS["refl"], GRID[0], seed, split, Path("base") / f"{split}_{seed}"), (0,))

    def trial(self, name: str, rate: float, seed: int) -> Task:
        """Return a method's run on the validation prompts, evaluated after the last stage only."""
        folder = Path("rates") / name / f"{rate:g}"
        return Task(self.recipe(METHODS[name], rate, seed, "validation", folder), self.stages[-1:])

    def run(self, name: str, rate: float, seed: int) -> Task:
        """Return one of the table's runs."""
        folder = Path("seeds") / name / f"{rate:g}" / str(seed)
        return Task(self.recipe(METHODS[name], rate, seed, "heldout", folder), self.stages)


def rates_to_try(rewards: dict[float, float], rates: Sequence[float]) -> tuple[float, ...]:
    """Return the rates to try: those that all methods try, and the grid's next where the best rate lies at an edge.

    Args:
        rewards: {rate: the reward on validation prompts} of the finished runs.
    """
    if set(rates) - rewards.keys():
        return tuple(rates)
    best, low, high = max(rewards, key=rewards.__getitem__), min(rewards), max(rewards)
    place = GRID.index(best)
    further = [GRID[place - 1]] if best == low and place else []
    further += [GRID[place + 1]] if best == high and place + 1 < len(GRID) else []
    return tuple(sorted({*rewards, *further}))
