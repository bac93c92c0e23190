"""One run of the study, resumable: a recipe trained in stages, held-out images of the averaged weights after each."""

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
from trajsurgery.training.checkpoint import METRICS, Log, TrainingState, resume, write_atomically
from trajsurgery.training.recipe import Recipe, differences
from trajsurgery.training.training_loop import train

DONE = "done.json"
"""Written last into a run's folder."""


@dataclass(frozen=True)
class Task:
    """What one process does at a time."""

    recipe: Recipe
    """Its `output` is the folder of the run, its `iterations` the last stage."""
    stages: tuple[int, ...]
    """Iterations, rising, after which held-out images are made; (0,) is the untuned model's alone."""

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self.recipe.output

    @property
    def cost(self) -> int:
        """In iterations; the 480 images of a stage cost about as much as 15."""
        return self.stages[-1] + 15 * len(self.stages)


def is_finished(task: Task) -> bool:
    """Whether the folder holds all of it, or the run diverged.

    Raises:
        RecipeError: the folder holds a finished run of another recipe.
    """
    path = task.folder / DONE
    if not path.exists():
        return False
    there = json.loads(path.read_text())
    changed = differences(there["recipe"], task.recipe.to_dict())
    if changed:
        raise RecipeError(
            f"{task.folder} holds a finished run of another recipe; it differs in {'; '.join(changed)}. "
            "Pass --runs with another folder, or delete that one."
        )
    return "diverged" in there or all((task.folder / name(stage)).exists() for stage in task.stages)


def has_scores(task: Task) -> bool:
    """Whether it is finished and did not diverge: whether there are scores."""
    return is_finished(task) and "diverged" not in load_record(task)


def name(stage: int) -> str:
    """The file of a stage's scores."""
    return f"scores_{stage}.pt"


def load_scores(folder: Path, stage: int) -> HeldOutScores:
    """What a run's images were given after a stage, image by image."""
    return HeldOutScores.from_dict(torch.load(folder / name(stage), weights_only=True))


def load_iterations(folder: Path) -> list[dict[str, Any]]:
    """The run's iterations, line by line."""
    return [line for line in Log(folder / METRICS).read() if line["kind"] == "iteration"]


def spent_cost(task: Task) -> int:
    """How much of a task's cost is spent."""
    log = task.folder / METRICS
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    return lines + 15 * sum((task.folder / name(stage)).exists() for stage in task.stages)


def run_task(task: Task) -> bool:
    """Does a task, or what is left of it; False if it was interrupted (it is saved).

    Raises:
        RecipeError: the folder holds another recipe's run.
    """
    torch.set_num_threads(task.recipe.threads)
    found = components.load(task.recipe)
    training = TrainingState.start(task.recipe, found.module)
    resume(task.recipe, training)
    components.PromptCache(
        found.pipe, found.texts
    )  # all at once, so that they do not depend on where a run was interrupted
    ended: dict[str, str] = {}
    for stage in task.stages:
        try:
            if stage and not train(replace(task.recipe, iterations=stage), found, training, lambda _: None):
                return False
        except DivergedError as error:  # ends this run, not the study
            ended["diverged"] = str(error)
            break
        path = task.folder / name(stage)
        if not path.exists():
            held = evaluate_weights(task.recipe, found, training, averaged=stage > 0)
            write_atomically(path, lambda partial, held=held: torch.save(held.to_dict(), partial))
    record = {
        "recipe": task.recipe.to_dict(),
        "stages": list(task.stages),
        "skipped": training.skipped,
        "seconds": round(training.seconds, 1),
        "commit": commit(),
        "world": world_fingerprint(),
        **ended,
    }
    write_atomically(task.folder / DONE, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))
    return True


def evaluate_weights(
    recipe: Recipe, found: components.RunComponents, training: TrainingState, averaged: bool
) -> HeldOutScores:
    """The evaluation of the averaged weights; the weights that train are put back."""
    if not averaged:
        return evaluate(recipe, found)
    training.ema.store(training.parameters)
    training.ema.copy_to(training.parameters)
    try:
        return evaluate(recipe, found)
    finally:
        training.ema.restore(training.parameters)


@cache
def world_fingerprint() -> str:
    """Of the weights of Flux and scorers: runs of two worlds are not to be mixed in a table."""
    folder = Path(tiny.__file__).parent / "weights"
    digest = hashlib.sha256()
    for part in ("pipeline", "scorer", "scorer_b", "scorer_c"):
        for path in sorted((folder / part).rglob("*.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def diverged_runs(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{run: what was said}, of finished runs that diverged."""
    return {"/".join(Path(r["recipe"]["output"]).parts[-3:]): r["diverged"] for r in records if "diverged" in r}


def load_record(task: Task) -> dict[str, Any]:
    """What done.json says of a finished task."""
    return json.loads((task.folder / DONE).read_text())
