"""What a run leaves at its end: averaged weights, pictures, the comparison of before and after."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.console import Console

from trajsurgery.evaluation import validation_rounds
from trajsurgery.evaluation.held_out import HeldOutScores, evaluate
from trajsurgery.evaluation.paired_statistics import compare
from trajsurgery.runs.reports import run_report
from trajsurgery.runs.reports.saved_pictures import save_samples
from trajsurgery.training.checkpoints.checkpoint import restore_best
from trajsurgery.training.checkpoints.output_files import storage_errors, write_atomically
from trajsurgery.training.checkpoints.run_log import Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import RunComponents
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.endings import range_left
from trajsurgery.training.model import lora
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import iteration_generator

ONE_TIME = ("overwrite", "dry_run", "fit")
"""Flags that a run's recipe.yaml leaves out: a command with that file would discard the run."""


def save_recipe(recipe: Recipe) -> None:
    """Write recipe.json, which `trajsurgery evaluate` reads, and recipe.yaml, which `--config` takes."""
    import yaml

    settings = recipe.to_dict()
    write_atomically(recipe.output / "recipe.json", lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))
    kept = {name: value for name, value in settings.items() if name not in ONE_TIME}
    write_atomically(recipe.output / "recipe.yaml", lambda path: path.write_text(yaml.safe_dump(kept, sort_keys=False)))


def save_results(recipe: Recipe, parts: RunComponents, training: TrainingState, console: Console) -> dict[str, Any]:
    """Put the averaged weights into the pipeline, save and evaluate them, and draw the pictures."""
    if recipe.guards.patience is not None:
        restore_best(recipe, training)
    sharding.release(parts.module)
    with torch.no_grad():
        for parameter, average in zip(training.local, training.ema.shadow_params, strict=True):
            parameter.copy_(average)
    with storage_errors(recipe.output / "transformer"):
        lora.save_trained(parts.pipe, recipe.train, recipe.output / "transformer")
    with console.status("held-out images of the tuned model"):
        after = evaluate(recipe, parts)
    assert training.before is not None, "the untuned model is evaluated before the first iteration"
    before = HeldOutScores.from_dict(training.before)
    if ranks.is_main():
        plan = recipe.method.draw(recipe.rollout.steps, iteration_generator(recipe.seed, 1, "plan"))
        with storage_errors(recipe.output / "samples.png"):
            run_report.draw_samples(recipe.output / "samples.png", run_title(recipe, training), before, after)
            plan.draw(recipe.output / "plan.svg")
        text = f"{plan}\n\n{plan.gradient()}\n"
        write_atomically(recipe.output / "plan.txt", lambda path: path.write_text(text, encoding="utf-8"))
        save_samples(recipe.output, before, after)
    counts = {"iterations": training.iteration, "skipped": training.skipped, "range": range_left(recipe, training)}
    return {**compare(before, after), **counts, **validation_rounds.guards_summary(recipe, parts, training)}


def run_title(recipe: Recipe, training: TrainingState) -> str:
    """Return the title of a run's pictures."""
    length = f"{training.iteration} iterations of {recipe.rollout.batch}"
    return f"{type(recipe.method).__name__} on {run_report.model_label(recipe.model)}, {length}"


def draw_results(recipe: Recipe, training: TrainingState, evaluation: dict[str, Any], log: Log) -> None:
    """Draw reward.png and heldout.png. Of several ranks the first one draws."""
    if ranks.is_main():
        title = run_title(recipe, training)
        with storage_errors(recipe.output / "reward.png"):
            run_report.draw_curve(recipe.output / "reward.png", title, log.read())
            run_report.draw_held_out(recipe.output / "heldout.png", title, evaluation)
