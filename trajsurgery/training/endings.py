"""How a run ends that did not do what it should: what happened, what was saved, and how to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trajsurgery.errors import DivergedError, RecipeError
from trajsurgery.training.checkpoints.checkpoint import CHECKPOINTS, checkpoint_in_range, save
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.faults.bad_numbers import BadNumbers
from trajsurgery.training.recipe import Recipe

_RATE = "lower --optimiser.rate"
_REMEDIES = {
    "the velocity": f"{_RATE}, or take --rollout.precision float32 or another --attention",
    "the plan's output": f"{_RATE}, or take --rollout.precision float32",
    "the decoder": "take --decoder.precision float32",
    "the reward": "score these prompts with the reward alone, and mend or leave out what it can't score",
    "the gradient of reward": "take --decoder.precision float32, and check the reward's gradient at these prompts",
}
"""What mends numbers that are not finite, by the beginning of the part in which they were first."""


def advice(bad: Sequence[BadNumbers]) -> str:
    """Return what to change, by the part whose numbers were the first that are not finite."""
    part = bad[0].part if bad else ""
    return next((remedy for start, remedy in _REMEDIES.items() if part.startswith(start)), _REMEDIES["the velocity"])


def range_left(recipe: Recipe, training: TrainingState) -> dict[str, Any] | None:
    """Return since when the loss is out of its range, and the checkpoint from before, in the output folder; None if it
    is inside.
    """
    if training.loss_range.left is None:
        return None
    folder = checkpoint_in_range(recipe.output, training)
    return {"iteration": training.loss_range.left, "checkpoint": folder and f"{CHECKPOINTS}/{folder.name}"}


def range_report(output: Path, left: Mapping[str, Any] | None) -> str:
    """Return what `range_left` found as sentences; "" if the loss is inside."""
    if left is None:
        return ""
    start = f"The loss left its range at iteration {left['iteration']}"
    if left["checkpoint"] is None:
        return f"{start}; no checkpoint from before is left (--keep)."
    folder = output / left["checkpoint"]
    return (
        f"{start}; {folder} is from before, and stays. To go on from it: the same command with --start {folder}, "
        "another --output, and what is to be mended."
    )


def give_up(recipe: Recipe, training: TrainingState, bad: Sequence[BadNumbers]) -> NoReturn:
    """Save what is finite and stop the run.

    Args:
        bad: of the last iteration.

    Raises:
        DivergedError: always.
    """
    finite = training.finite
    if finite:
        save(recipe, training)
        state = f"The weights are finite, unchanged since iteration {training.iteration - training.in_a_row}, and saved"
    else:
        state = "The weights are not finite any more; the last checkpoint whose weights are is"
    cause = "; ".join(map(str, bad)) if bad else "the last step made weights that are not finite"
    raise DivergedError(
        f"the run stopped at iteration {training.iteration}, after {training.in_a_row} in a row with numbers that are "
        f"not finite ({training.skipped} in all): {cause}. {state} in {recipe.output}. To mend it, {advice(bad)}. "
        f"{range_report(recipe.output, range_left(recipe, training))}".rstrip()
    )


def check_something_trained(recipe: Recipe, training: TrainingState, bad: Sequence[BadNumbers]) -> None:
    """Raise if a run that is at its end has changed nothing.

    Args:
        bad: of the last iteration.

    Raises:
        RecipeError: all iterations were skipped, had no gradient, or made steps that left every weight as it was.
    """
    if training.skipped == training.iteration:
        cause = f"in each one numbers were not finite; in the last one {'; '.join(map(str, bad))}. {advice(bad)}"
    elif training.steps == 0:
        skipped = f" ({training.skipped} others were skipped: numbers were not finite)" if training.skipped else ""
        cause = (
            f"all scores were at or above the hinge's lambda, which gives no gradient{skipped}. "
            "Raise --objective.threshold"
        )
    elif training.fingerprint() == training.started:
        cause = "each step was smaller than the weights can hold. Raise --optimiser.rate"
    else:
        return
    raise RecipeError(f"nothing was trained in {training.iteration} iterations: {cause}.")
