"""What to change in a recipe that ran out of memory, with the dry run's figures."""

from __future__ import annotations

from dataclasses import replace

from trajsurgery.dry_run.fit import Trials, alternatives, fit, memory_words
from trajsurgery.dry_run.memory_plan import Kernels
from trajsurgery.dry_run.savings import flags
from trajsurgery.errors import SurgeryError
from trajsurgery.training.recipe import Recipe

UNCOUNTED = (
    "--rollout.at-once 1",
    "--rollout.checkpointing",
    "--decoder.tiling 256 --decoder.checkpointing",
    "--rollout.memory staged",
    "--train.what lora",
    "a smaller --rollout.size",
)
"""For a model that the dry run has no config of."""


def memory_advice(recipe: Recipe, gpus: int, memory: float | None, kernels: Kernels) -> list[str]:
    """Return lines: each change that takes less memory, in order of effect, and the cheapest setting that fits.

    Args:
        gpus: processes of the run.
        memory: bytes of one GPU; None where none is to be fitted, on a CPU.
    """
    recipe = replace(recipe, hardware=replace(recipe.hardware, gpus=gpus))
    try:
        trials = Trials(recipe, kernels=kernels)
        now, changes = trials.plan(recipe).peak, alternatives(recipe, trials)
    except SurgeryError as error:
        return [f"What takes less: {', '.join(UNCOUNTED)}. The dry run can't count it: {error}"]
    lines = [f"  {memory_words(change.peak):>9}  {change.flags}    {change.says}" for change in changes]
    head = f"By the dry run an iteration takes {memory_words(now)}. " + (
        "What takes less, in order of effect:" if lines else "No setting takes less; a smaller --rollout.size does."
    )
    if memory is None or not lines:
        return [head, *lines]
    result = fit(recipe, memory, trials)
    if not result.plan.fits or not result.changes:
        return [head, *lines]
    return [
        head,
        *lines,
        f"The cheapest that fits, {memory_words(result.plan.peak)}: {' '.join(flags(recipe, result.recipe))}",
    ]
