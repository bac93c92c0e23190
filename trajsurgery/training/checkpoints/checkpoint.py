"""Checkpoints: folders `checkpoints/ITERATION` of a run's output folder, and a log that is cut back to them on resume.

All draws of an iteration follow from the seed and its number, so no generator state is saved. A run that was killed and
resumed equals one that was not, bit for bit (on one machine, with the same number of threads and processes).
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.tensor_folder import (
    damage,
    read_about,
    read_into,
    read_state,
    read_tensors,
    recover_replaced,
    tensor_shapes,
    write_folder,
)
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.distributed import ranks
from trajsurgery.training.recipe import Recipe, differences

CHECKPOINTS, BEST, COMPILED, SHEETS, TRACKER_ID = "checkpoints", "best", "compiled.json", "sheets", "tracker_id"

_LIBRARIES = ("trajsurgery", "torch", "diffusers", "transformers", "peft")
_WAYS_OUT = "Pass --overwrite to discard that run, or --output with another folder."


def library_versions() -> dict[str, str]:
    """Return the versions that a run depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def save(recipe: Recipe, training: TrainingState) -> None:
    """Write a checkpoint; delete older ones but `recipe.keep`, and the one from before the loss left its range.

    Raises:
        OutputError: the file system refuses; earlier checkpoints are whole.
    """
    about = {
        "iteration": training.iteration,
        "best": training.early_stopping.best,
        "recipe": recipe.to_dict(),
        "versions": library_versions(),
        "processes": ranks.count(),
    }
    folder = _numbered(recipe.output / CHECKPOINTS, training.iteration)
    write_folder(folder, training.tensors, training.counters(), about)
    training.saved = training.position
    if ranks.is_main():
        in_range = checkpoint_in_range(recipe.output, training)
        for other in list_checkpoints(recipe.output)[recipe.keep :]:
            if other != in_range:
                shutil.rmtree(other)
        _delete_unused_best(recipe.output)
    if training.on_save is not None:
        training.on_save(folder)


def save_best(recipe: Recipe, training: TrainingState) -> None:
    """Write the averaged weights of the best validation round, then the checkpoint that names them."""
    write_folder(_numbered(recipe.output / BEST, training.iteration), training.averages, {}, {})
    save(recipe, training)


def restore_best(recipe: Recipe, training: TrainingState) -> None:
    """Set the averaged weights to those of the best validation round.

    Raises:
        RecipeError: they can't be read, or no round had a finite score.
    """
    if training.early_stopping.best < 0:
        raise RecipeError(
            "no look had a finite score, so that no weights are the best ones. Mend the scorer, name another one with "
            "--guards.by, or go without --guards.patience; the last iteration is saved."
        )
    folder = _numbered(recipe.output / BEST, training.early_stopping.best)
    reason = damage(folder)
    if reason:
        raise RecipeError(
            f"{folder}, the weights of the best look, can't be read ({reason}). Start the run anew with --overwrite."
        )
    read_into(folder, training.averages)


def saved_tensors(output: Path, group: Literal["weights", "averages", "optimiser"]) -> dict[str, Tensor]:
    """Return what the newest checkpoint of a run holds, whole, by the parameters' names, on the CPU."""
    return read_tensors(list_checkpoints(output)[0], f"{group}.")


def _numbered(folder: Path, iteration: int) -> Path:
    return folder / f"{iteration:06d}"


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the newest first."""
    return sorted((path for path in (output / CHECKPOINTS).glob("*") if path.name.isdecimal()), reverse=True)


def checkpoint_in_range(output: Path, training: TrainingState) -> Path | None:
    """Return the newest checkpoint whose weights gave a loss inside the range, if the run has left it (loss_range.py).

    The first iteration outside was computed with the weights of the one before it.
    """
    left = training.loss_range.left
    if left is None:
        return None
    return next((folder for folder in list_checkpoints(output) if int(folder.name) <= left - 2), None)


def _delete_unused_best(output: Path) -> None:
    """Delete best weights that no checkpoint names."""
    used = set[Path]()
    for folder in list_checkpoints(output):
        with suppress(OSError, ValueError):  # a damaged checkpoint uses none
            used.add(_numbered(output / BEST, read_about(folder)["best"]))
    for path in (output / BEST).glob("*"):
        if path not in used:
            shutil.rmtree(path)


def resume(recipe: Recipe, training: TrainingState, say: Callable[[str], None] = print) -> bool:
    """Restore the newest whole checkpoint in the output folder, if there is one; return whether there was.

    Args:
        say: called with a line for each damaged checkpoint that is passed over.

    Raises:
        RecipeError: it belongs to another recipe, is further than this one, or does not fit the model; none is whole.
    """
    if ranks.is_main():
        recover_replaced(recipe.output / CHECKPOINTS)
    ranks.wait_for_all()
    folders = list_checkpoints(recipe.output)
    if recipe.overwrite or not folders:
        ranks.wait_for_all()  # all have seen that there is none
        if ranks.is_main():
            discard(recipe.output)
        return False
    folder = _newest_whole(recipe, folders, say)
    try:
        counters = read_state(folder)
        _read_tensors(folder, training)
        training.set_counters(counters)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{folder} does not fit the model: {error}. {_WAYS_OUT}") from error
    training.saved = training.position
    ranks.wait_for_all()  # all have read it
    Log(recipe.output / METRICS).cut(training.iteration, training.early_stopping.last)
    return True


def start_from(recipe: Recipe, training: TrainingState) -> None:
    """Begin with the weights, averages and moments of the checkpoint that `recipe.start` names, if it names one.

    Raises:
        RecipeError: it is damaged or no checkpoint, or does not fit the model or the optimiser.
    """
    if recipe.start is None:
        return
    folder = Path(recipe.start)
    if reason := damage(folder):
        raise RecipeError(f"--start {folder}: it is no whole checkpoint of a run ({reason}).")
    try:
        _read_tensors(folder, training)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RecipeError(f"--start {folder} does not fit the model or the optimiser: {error}.") from error
    training.ema.load_state_dict(read_state(folder)["ema"])


def _read_tensors(folder: Path, training: TrainingState) -> None:
    if any(name.startswith("optimiser.") for name in tensor_shapes(folder)):
        training.allocate_moments()
    read_into(folder, training.tensors)


def _newest_whole(recipe: Recipe, folders: Sequence[Path], say: Callable[[str], None]) -> Path:
    """Return the newest checkpoint that is whole and this recipe's; delete the newer, damaged ones."""
    damaged = dict[Path, str]()
    for folder in folders:
        reason = damage(folder)
        if not reason:
            _check_same_recipe(recipe, read_about(folder))
            ranks.wait_for_all()
            for path, what in damaged.items():
                say(f"{path} is damaged ({what}): the run goes on from iteration {int(folder.name)}")
                if ranks.is_main():
                    shutil.rmtree(path)
            return folder
        damaged[folder] = reason
    reasons = "\n  ".join(f"{path}: {reason}" for path, reason in damaged.items())
    raise RecipeError(f"no checkpoint in {recipe.output} is whole:\n  {reasons}\n{_WAYS_OUT}")


def _check_same_recipe(recipe: Recipe, about: dict[str, Any]) -> None:
    changed = differences(about["recipe"], recipe.to_dict())
    if changed:
        raise RecipeError(
            f"{recipe.output} holds a run of another recipe, {about['iteration']} iterations long. It differs in\n  "
            + "\n  ".join(changed)
            + f"\n{_WAYS_OUT} To go on with it, run it with its own settings."
        )
    if about["iteration"] > recipe.iterations:
        raise RecipeError(
            f"{recipe.output} holds {about['iteration']} iterations of this recipe, more than the {recipe.iterations} "
            f"asked for. {_WAYS_OUT}"
        )


def discard(output: Path) -> None:
    """Delete the checkpoints, the log, the best weights, the compile trial and the contact sheets of an earlier run."""
    for name in (METRICS, COMPILED, TRACKER_ID):
        (output / name).unlink(missing_ok=True)
    for folder in (CHECKPOINTS, BEST, SHEETS):
        shutil.rmtree(output / folder, ignore_errors=True)
    for path in output.glob("*.partial"):
        path.unlink()
