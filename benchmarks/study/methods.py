"""The methods of the study, and the runs that every one of them gets: the same recipe but for method and rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.study.runs import Task
from trajsurgery import methods
from trajsurgery.training.recipe import Method, Recipe, presets

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
"""Held-out images that are kept to be looked at."""

Split = Literal["heldout", "validation"]


@dataclass(frozen=True)
class Budget:
    """What all runs of a study have in common."""

    stages: tuple[int, ...]
    """Iterations after which held-out images are made; the last is the budget."""
    images: int
    """Held-out images a run."""
    runs: Path
    """Where the runs are."""

    def recipe(self, method: Method, rate: float, seed: int, split: Split, folder: Path) -> Recipe:
        """The embedded Flux's recipe of a method, at a rate, on a seed."""
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
        """The untuned model's images of a seed, which all methods share."""
        return Task(self.recipe(METHODS["refl"], GRID[0], seed, split, Path("base") / f"{split}_{seed}"), (0,))

    def trial(self, name: str, rate: float, seed: int) -> Task:
        """A method's run on the validation prompts; its last stage alone is graded."""
        folder = Path("rates") / name / f"{rate:g}"
        return Task(self.recipe(METHODS[name], rate, seed, "validation", folder), self.stages[-1:])

    def run(self, name: str, rate: float, seed: int) -> Task:
        """One of the table's runs."""
        folder = Path("seeds") / name / f"{rate:g}" / str(seed)
        return Task(self.recipe(METHODS[name], rate, seed, "heldout", folder), self.stages)


def rates_to_try(found: dict[float, float], rates: Sequence[float]) -> tuple[float, ...]:
    """The rates to try: those that all methods try, and the grid's next where the best of all tried lies at an edge.

    Args:
        found: {rate: the reward on validation prompts}, of the runs that are finished.
    """
    if set(rates) - found.keys():
        return tuple(rates)
    best, low, high = max(found, key=found.__getitem__), min(found), max(found)
    place = GRID.index(best)
    beyond = [GRID[place - 1]] if best == low and place else []
    beyond += [GRID[place + 1]] if best == high and place + 1 < len(GRID) else []
    return tuple(sorted({*found, *beyond}))
