"""Contact sheets: pictures of fixed held-out prompts every so many iterations, from the same noise."""

from __future__ import annotations

from dataclasses import replace

from trajsurgery.evaluation.held_out import HeldOutScores, evaluate
from trajsurgery.runs.gradient_terms import term_norms
from trajsurgery.runs.reports.saved_pictures import save_sheet
from trajsurgery.training.anchor import swapped
from trajsurgery.training.checkpoints.checkpoint import SHEETS
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import RunComponents
from trajsurgery.training.distributed import ranks
from trajsurgery.training.faults.memory_errors import is_out_of_memory
from trajsurgery.training.recipe import Recipe


def is_due(recipe: Recipe, iteration: int) -> bool:
    """Whether a sheet is to be made after an iteration, and is not there yet. All ranks agree."""
    every = recipe.evaluation.sheet_every
    if every is None or (iteration % every and iteration != recipe.iterations):
        return False
    return not ranks.any_rank((recipe.output / SHEETS / f"{iteration:06d}" / "sheet.json").exists())


def make_sheet(recipe: Recipe, components: RunComponents, training: TrainingState) -> HeldOutScores:
    """Make the pictures with the averaged weights, save them, and return them with their rewards.

    The sheet also says how large each kind of term of the gradient is.
    """
    count = recipe.evaluation.sheet_images
    few = replace(recipe, evaluation=replace(recipe.evaluation, images=count, pictures=count))
    only_reward = replace(components, judge=None, metrics={})
    with swapped(training.module, training.ema.shadow_params):
        scores = evaluate(few, only_reward)
    terms = _terms_if_they_fit(recipe, components, training.iteration)
    if ranks.is_main():
        save_sheet(recipe.output, training.iteration, scores, terms)
    return scores


def _terms_if_they_fit(recipe: Recipe, components: RunComponents, iteration: int) -> dict[str, float] | None:
    """Return the norms of the gradient's terms; None where memory does not suffice, which a training step may need."""
    try:
        return term_norms(recipe, components, iteration)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
