"""`main(recipe)`: the main job from start to end, and `cli`, which makes a script of a recipe."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trajsurgery.dry_run import plan_memory, table
from trajsurgery.errors import SurgeryError
from trajsurgery.evaluation import validation_rounds
from trajsurgery.evaluation.held_out import Scores, evaluate, needed
from trajsurgery.evaluation.paired_statistics import compare
from trajsurgery.reports import run_report, validation_report
from trajsurgery.training import components, lora, missing_gradients, preflight, srpo_support
from trajsurgery.training.checkpoint import METRICS, Log, Training, resume, save, write_whole
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import Iteration, generator, train

INTERRUPTED = 130
"""The exit code of a run that Ctrl-C or SIGTERM stopped, and that the same command goes on with."""


def cli(presets: Mapping[str, Recipe], description: str, args: Sequence[str] | None = None) -> int:
    """Reads a recipe from the command line and runs it; returns the exit code."""
    console = Console()
    given = list(sys.argv[1:] if args is None else args)
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    preset = presets[chosen.parse_known_args(given)[0].preset]
    try:
        with warnings.catch_warnings():  # tyro reads a method of the user's own all the same
            warnings.filterwarnings("ignore", message=".*does not match any type in Union")
            recipe = tyro.cli(Recipe, default=preset, args=given, description=description, console_outputs=True)
        if recipe.dry_run:
            return dry_run(recipe, console)
        return INTERRUPTED if main(recipe, console=console) is None else 0
    except KeyboardInterrupt:
        console.print("interrupted before the first iteration, or while pictures were made: the same command goes on")
        return INTERRUPTED
    except SurgeryError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1


def dry_run(recipe: Recipe, console: Console) -> int:
    """Prints what the run would take, and writes it to memory.json; returns the exit code."""
    with console.status("counting under fake tensors"):
        found = plan_memory(recipe)
    console.print(table(found), highlight=False)
    path = recipe.output / "memory.json"
    write_whole(path, lambda partial: partial.write_text(json.dumps(found.to_dict(), indent=1) + "\n"))
    console.print(f"In {path}.", highlight=False)
    return 0


def main(
    recipe: Recipe, scene: components.RunComponents | None = None, console: Console | None = None
) -> dict[str, Any] | None:
    """Runs a recipe: evaluation, training, evaluation, pictures, weights. Goes on with a run that was interrupted.

    Args:
        scene: what the recipe's names stand for, if they are not to be resolved.

    Returns:
        The evaluation's line of metrics.jsonl; None if the run was interrupted (it is saved).

    Raises:
        RecipeError: the run can't start here, or the output folder holds another recipe's, or it diverged.
    """
    console, began = console or Console(), time.monotonic()
    if scene is None:
        preflight.check(recipe)
    torch.set_num_threads(recipe.threads)
    found = scene or components.load(recipe)
    components.trial(recipe, found)
    srpo_support.steerable(recipe, found.module)
    validation_rounds.check(recipe, found)
    training = Training.start(recipe, found.module)
    log = Log(recipe.output / METRICS)
    finished = _finished(log)
    if resume(recipe, training):
        if finished and (
            training.iteration == recipe.iterations or training.early_stopping.stops(recipe.guards.patience)
        ):
            log.append(finished)
            return _said(recipe, console, finished, "this run is finished; --overwrite runs it again")
        console.print(f"goes on from iteration {training.iteration} in {recipe.output}")
    spent, every = training.seconds, range(1, recipe.iterations + 1)  # in the same batches wherever it goes on
    asked = needed(found.heldout, recipe.evaluation.images) + needed(found.validation, recipe.guards.images)
    with console.status("prompts are encoded"):
        components.encode(recipe, found, asked, (generator(recipe.seed, number, "prompts") for number in every))
    if training.before is None:
        with console.status("held-out images of the untuned model"):
            training.before = evaluate(recipe, found).to_dict()
        training.seconds = time.monotonic() - began
        save(recipe, training)
    with _progress(recipe, training, console) as watch:
        validate = validation_rounds.looking(recipe, found, training, partial(_look, console))
        complete = train(recipe, found, training, watch, validate)
    if not complete:
        console.print(f"interrupted at iteration {training.iteration}, saved: the same command goes on from there")
        return None
    evaluation = _finish(recipe, found, training, console)
    evaluation["seconds"] = round(spent + time.monotonic() - began, 1)
    log.append(evaluation)
    run_report.curve(recipe.output / "reward.png", _title(recipe, training), log.read())
    run_report.heldout(recipe.output / "heldout.png", _title(recipe, training), evaluation)
    return _said(recipe, console, evaluation, "")


def _look(console: Console, found: validation_rounds.ValidationResult) -> None:
    console.print(validation_report.line(found), highlight=False, soft_wrap=True)


def _finished(log: Log) -> dict[str, Any] | None:
    """The evaluation with which the log ends, if it does."""
    lines = log.read()
    return lines[-1] if lines and lines[-1]["kind"] == "evaluation" else None


def _finish(recipe: Recipe, found: components.RunComponents, training: Training, console: Console) -> dict[str, Any]:
    """The averaged weights into the pipe, their evaluation, and everything there is to look at."""
    validation_rounds.restore_best(recipe, training)
    training.ema.copy_to(training.parameters)
    lora.save(found.pipe, recipe.train, recipe.output / "transformer")
    write_whole(
        recipe.output / "recipe.json", lambda path: path.write_text(json.dumps(recipe.to_dict(), indent=1) + "\n")
    )
    with console.status("held-out images of the tuned model"):
        after = evaluate(recipe, found)
    assert training.before is not None, "the untuned model is evaluated before the first iteration"
    before = Scores.from_dict(training.before)
    run_report.samples(recipe.output / "samples.png", _title(recipe, training), before, after)
    plan = recipe.method.draw(recipe.rollout.steps, generator(recipe.seed, 1, "plan"))
    plan.draw(recipe.output / "plan.svg")
    counts = {"iterations": training.iteration, "skipped": training.skipped}
    return {**compare(before, after), **counts, **validation_rounds.summary(recipe, found, training)}


def _title(recipe: Recipe, training: Training) -> str:
    length = f"{training.iteration} iterations of {recipe.rollout.batch}"
    return f"{type(recipe.method).__name__} on {recipe.model}, {length}"


def _said(recipe: Recipe, console: Console, evaluation: dict[str, Any], remark: str) -> dict[str, Any]:
    """The closing words."""
    console.print(run_report.table(evaluation))
    for line in (run_report.verdict(evaluation), *run_report.remarks(evaluation)):
        console.print(line, highlight=False)
    if evaluation["skipped"]:
        skipped = f"[bold red]skipped iterations: {evaluation['skipped']}[/] (loss or gradient not finite)"
        console.print(skipped, highlight=False)
    console.print(
        f"{evaluation['seconds']:.0f} s. In {recipe.output}: samples.png, reward.png, heldout.png, plan.svg, "
        "metrics.jsonl, transformer/" + (f"\n{remark}" if remark else ""),
        highlight=False,
    )
    return evaluation


@contextmanager
def _progress(recipe: Recipe, training: Training, console: Console) -> Generator[Callable[[Iteration], None]]:
    """A bar with reward, loss, gradient norm and time left; a plain line now and then where there is no terminal."""
    figures = TextColumn(
        "reward {task.fields[reward]} loss {task.fields[loss]} |g| {task.fields[norm]}{task.fields[skipped]}"
    )
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), figures, TimeRemainingColumn())
    every = max(1, recipe.iterations // 10)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        name = type(recipe.method).__name__
        task = progress.add_task(
            name, total=recipe.iterations, completed=training.iteration, reward="", loss="", norm="", skipped=""
        )

        def watch(record: Iteration) -> None:
            skipped = f" [bold red]skipped {training.skipped}[/]" if training.skipped else ""
            shown: dict[str, Any] = {
                "reward": f"{record.reward:.4f}",
                "loss": f"{record.loss:.3f}",
                "norm": f"{record.grad_norm:.3g}",
            }
            progress.update(task, completed=record.iteration, **shown, skipped=skipped)
            if record.idle:
                said = missing_gradients.warning(record.idle, len(training.parameters))
                console.print(f"iteration {record.iteration}: {said}", style="yellow", markup=False, highlight=False)
            if not console.is_terminal and (record.iteration % every == 0 or record.skipped):
                figures = " ".join(f"{key} {value}" for key, value in shown.items())
                left = (recipe.iterations - record.iteration) * record.seconds
                console.print(
                    f"{name} {record.iteration}/{recipe.iterations} {figures}{skipped} about {left:.0f} s left",
                    highlight=False,
                )

        yield watch
