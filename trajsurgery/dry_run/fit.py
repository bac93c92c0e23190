"""The cheapest setting of a recipe that fits a memory, by dry runs; what each single change would take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trajsurgery.dry_run.fake_pipeline import PipelineSpec, find_spec
from trajsurgery.dry_run.memory_plan import Kernels, MemoryPlan, plan_memory
from trajsurgery.dry_run.model_costs import Measurements
from trajsurgery.dry_run.savings import Saving, flags, savings
from trajsurgery.errors import RecipeError
from trajsurgery.training.recipe import Recipe

SMALLER = (640, 512, 384, 256)
"""Sides in pixels that are tried where no other change suffices."""


@dataclass(frozen=True)
class Fit:
    """The result of a search."""

    memory: float
    """Bytes that the setting was to fit."""
    recipe: Recipe
    """The cheapest setting that fits; if none does, the one that takes least."""
    changes: tuple[tuple[str, str], ...]
    """(what, flags) of each change."""
    before: MemoryPlan
    plan: MemoryPlan
    """The dry run of `recipe`."""
    smaller: tuple[Recipe, MemoryPlan] | None = None
    """Where nothing else fits: the largest size of `SMALLER` that does."""


@dataclass(frozen=True)
class Alternative:
    """One change of a recipe, and what it would take."""

    says: str
    flags: str
    peak: int
    """Bytes a GPU."""


def memory_words(count: float) -> str:
    """Return a number of bytes in GiB, in MiB below one."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def parse_memory(text: str) -> float:
    """Return the bytes that "24GB", "24 GB" or "22.4GiB" names.

    Raises:
        RecipeError: it names none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gi?b)\s*", text, flags=re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"--fit {text}: the memory of a card, such as 24GB (10^9 bytes each) or 22GiB (2^30 each).")
    return float(match[1]) * (2**30 if "i" in match[2].lower() else 1e9)


class Trials:
    """Dry runs of one recipe's variants, which share their measurements."""

    def __init__(self, recipe: Recipe, spec: PipelineSpec | None = None, kernels: Kernels = "cuda") -> None:
        self.spec = spec or find_spec(recipe.model)
        self._kernels: Kernels = kernels
        self._measurements, self._plans = Measurements(), dict[str, MemoryPlan]()

    def plan(self, recipe: Recipe) -> MemoryPlan:
        """Return the memory plan of a variant."""
        key = repr(recipe)
        if key not in self._plans:
            self._plans[key] = plan_memory(
                recipe, found=self.spec, kernels=self._kernels, measurements=self._measurements
            )
        return self._plans[key]


def fit(recipe: Recipe, memory: float, trials: Trials | None = None) -> Fit:
    """Return the cheapest setting that fits `memory` bytes a GPU.

    All changes of `savings` are made; then each is taken back, from the one that costs most, if the rest still fits.
    A change never takes more memory, so no setting that fits does without the costliest of those that remain.

    Raises:
        RecipeError: no config of the model.
    """
    recipe = replace(recipe, hardware=replace(recipe.hardware, memory=memory))
    trials = trials or Trials(recipe)
    before = trials.plan(recipe)
    if before.fits:
        return Fit(memory, recipe, (), before, before)
    changes = savings(recipe, trials.spec)
    smallest = _with(recipe, changes)
    if not trials.plan(smallest).fits:
        return Fit(memory, smallest, _words(recipe, changes), before, trials.plan(smallest), _smaller(trials, smallest))
    for change in reversed(changes):
        rest = [other for other in changes if other is not change]
        if trials.plan(_with(recipe, rest)).fits:
            changes = rest
    result = _with(recipe, changes)
    return Fit(memory, result, _words(recipe, changes), before, trials.plan(result))


def alternatives(recipe: Recipe, trials: Trials) -> list[Alternative]:
    """Return each single change that takes less memory than the recipe, the one with the greatest effect first."""
    now, variants = trials.plan(recipe).peak, [(s, s.apply(recipe)) for s in savings(recipe, trials.spec)]
    every = [Alternative(s.says, " ".join(flags(recipe, to)), trials.plan(to).peak) for s, to in variants]
    return sorted((alternative for alternative in every if alternative.peak < now), key=lambda a: a.peak)


def _with(recipe: Recipe, changes: Sequence[Saving]) -> Recipe:
    for change in changes:
        recipe = change.apply(recipe)
    return recipe


def _words(recipe: Recipe, changes: Sequence[Saving]) -> tuple[tuple[str, str], ...]:
    """Return (what, flags) of each change that a later one does not undo."""
    result, words = _with(recipe, changes), list[tuple[str, str]]()
    for change in changes:
        without = _with(recipe, [other for other in changes if other is not change])
        if without != result:
            words.append((change.says, " ".join(flags(without, result))))
    return tuple(words)


def _smaller(trials: Trials, recipe: Recipe) -> tuple[Recipe, MemoryPlan] | None:
    shape = recipe.rollout.shape
    for side in SMALLER:
        if shape is None or side < max(shape):
            height, width = shape or (side, side)
            scale = side / max(height, width)
            sides = {"size": _multiple(height * scale), "width": _multiple(width * scale) if height != width else None}
            variant = replace(recipe, rollout=replace(recipe.rollout, **sides))
            if (plan := trials.plan(variant)).fits:
                return variant, plan
    return None


def _multiple(side: float) -> int:
    return max(16, round(side / 16) * 16)
