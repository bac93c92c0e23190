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
    terms = term_norms(recipe, components, training.iteration)
    if ranks.is_main():
        save_sheet(recipe.output, training.iteration, scores, terms)
    return scores
