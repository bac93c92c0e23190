"""One resumable run of the study: a recipe trained in stages; after each, held-out images of the averaged weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import commit
from trajsurgery import tiny
from trajsurgery.errors import DivergedError, RecipeError
from trajsurgery.evaluation.held_out import HeldOutScores, evaluate
from trajsurgery.training import components
from trajsurgery.training.checkpoints.checkpoint import resume
from trajsurgery.training.checkpoints.output_files import lock_folder, write_atomically
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.recipe import Recipe, differences
from trajsurgery.training.training_loop import train

DONE = "done.json"
"""The file that is written last into a run's folder."""


@dataclass(frozen=True)
class Task:
    """One run: the unit of work of a process."""

    recipe: Recipe
    """Its `output` is the folder of the run, its `iterations` the last stage."""
    stages: tuple[int, ...]
    """Rising iterations after which held-out images are made; (0,) is the untuned model alone."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.recipe.output

    @property
    def cost(self) -> int:
        """Cost in iterations; the 480 images of a stage cost about as much as 15."""
        return self.stages[-1] + 15 * len(self.stages)


def is_finished(task: Task) -> bool:
    """Return whether the run is complete, or diverged.

    Raises:
        RecipeError: the folder holds a finished run of another recipe.
    """
    path = task.folder / DONE
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    changed = differences(record["recipe"], task.recipe.to_dict())
    if changed:
        raise RecipeError(
            f"{task.folder} holds a finished run of another recipe; it differs in {'; '.join(changed)}. "
            "Pass --runs with another folder, or delete that one."
        )
    return "diverged" in record or all((task.folder / scores_file(stage)).exists() for stage in task.stages)


def has_scores(task: Task) -> bool:
    """Return whether the run is finished and did not diverge."""
    return is_finished(task) and "diverged" not in load_record(task)


def scores_file(stage: int) -> str:
    """Return the name of the file with a stage's scores."""
    return f"scores_{stage}.pt"


def load_scores(folder: Path, stage: int) -> HeldOutScores:
    """Load the scores of a run's images after a stage."""
    return HeldOutScores.from_dict(torch.load(folder / scores_file(stage), weights_only=True))


def load_iterations(folder: Path) -> list[dict[str, Any]]:
    """Return the log records of the run's iterations."""
    return [line for line in Log(folder / METRICS).read() if line["kind"] == "iteration"]


def spent_cost(task: Task) -> int:
    """Return how much of a task's cost is spent."""
    log = task.folder / METRICS
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    return lines + 15 * sum((task.folder / scores_file(stage)).exists() for stage in task.stages)


def run_task(task: Task) -> bool:
    """Run what is left of a task; return False if it was interrupted (its state is saved).

    Raises:
        RecipeError: the folder holds a run of another recipe.
    """
    with lock_folder(task.folder):
        return _run_locked(task)


def _run_locked(task: Task) -> bool:
    torch.set_num_threads(task.recipe.threads)
    run = components.load(task.recipe)
    training = TrainingState.start(task.recipe, run.module)
    resume(task.recipe, training)
    # All prompts at once, so that embeddings do not depend on where a run was interrupted.
    components.PromptCache(run.pipe, run.texts)
    divergence: dict[str, str] = {}
    for stage in task.stages:
        try:
            if stage and not train(replace(task.recipe, iterations=stage), run, training, lambda _: None):
                return False
        except DivergedError as error:  # ends this run, not the study
            divergence["diverged"] = str(error)
            break
        path = task.folder / scores_file(stage)
        if not path.exists():
            scores = evaluate_weights(task.recipe, run, training, averaged=stage > 0)
            write_atomically(path, lambda partial, scores=scores: torch.save(scores.to_dict(), partial))
    record = {
        "recipe": task.recipe.to_dict(),
        "stages": list(task.stages),
        "skipped": training.skipped,
        "seconds": round(training.seconds, 1),
        "commit": commit(),
        "world": world_fingerprint(),
        **divergence,
    }
    write_atomically(task.folder / DONE, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))
    return True


def evaluate_weights(
    recipe: Recipe, run: components.RunComponents, training: TrainingState, averaged: bool
) -> HeldOutScores:
    """Evaluate the averaged weights (or the current ones), and put the training weights back."""
    if not averaged:
        return evaluate(recipe, run)
    training.ema.store(training.parameters)
    training.ema.copy_to(training.parameters)
    try:
        return evaluate(recipe, run)
    finally:
        training.ema.restore(training.parameters)


@cache
def world_fingerprint() -> str:
    """Return a hash of the weights of Flux and scorers: runs with different weights must not share a table."""
    folder = Path(tiny.__file__).parent / "weights"
    digest = hashlib.sha256()
    for part in ("pipeline", "scorer", "scorer_b", "scorer_c"):
        for path in sorted((folder / part).rglob("*.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def diverged_runs(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return {run: the error's message} of the finished runs that diverged."""
    return {"/".join(Path(r["recipe"]["output"]).parts[-3:]): r["diverged"] for r in records if "diverged" in r}


def load_record(task: Task) -> dict[str, Any]:
    """Return done.json of a finished task."""
    return json.loads((task.folder / DONE).read_text())
