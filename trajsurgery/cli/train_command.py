"""The training command: `main(recipe)` runs a recipe from start to end, `dry_run` says what it would take."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from trajsurgery.cli import fit_command
from trajsurgery.dry_run import plan_memory, table
from trajsurgery.dry_run.memory_advice import memory_advice
from trajsurgery.errors import OutOfMemoryError
from trajsurgery.evaluation import validation_rounds
from trajsurgery.evaluation.held_out import HeldOutScores, evaluate, needed_prompts
from trajsurgery.evaluation.paired_statistics import compare
from trajsurgery.runs.reports import run_report, validation_report
from trajsurgery.training import components, srpo_support
from trajsurgery.training.checkpoints.checkpoint import restore_best, resume, save, start_from
from trajsurgery.training.checkpoints.output_files import lock_folder, storage_errors, write_atomically
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.checks import compile_trial, preflight, trial
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.endings import range_left, range_report
from trajsurgery.training.faults import missing_gradients
from trajsurgery.training.faults.memory_errors import memory_of
from trajsurgery.training.model import lora
from trajsurgery.training.progress_bar import Advance, progress_bar
from trajsurgery.training.prompts import repetitions
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import StepRecord, iteration_generator, train


def dry_run(recipe: Recipe, console: Console, command: Sequence[str]) -> int:
    """Print what the run would take, or what fits, and write it to memory.json; return the exit code.

    Args:
        command: the whole command line, which a search repeats with other flags.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype")  # RMSNorm under autocast is not fused on a CPU
        if recipe.fit is not None:
            plan = fit_command.search(recipe, console, command)
        else:
            with console.status("counting under fake tensors"):
                plan = plan_memory(recipe)
    console.print(table(plan), highlight=False)
    path = recipe.output / "memory.json"
    write_atomically(path, lambda partial: partial.write_text(json.dumps(plan.to_dict(), indent=1) + "\n"))
    console.print(f"In {path}.", highlight=False)
    return 0


def main(
    recipe: Recipe, scene: components.RunComponents | None = None, console: Console | None = None
) -> dict[str, Any] | None:
    """Run a recipe: evaluate, train, evaluate, save pictures and weights. Resume a run that was interrupted.

    Args:
        scene: pipeline, rewards and prompts, if they should not be loaded from the recipe's names.

    Returns:
        The evaluation's line of metrics.jsonl; None if the run was interrupted (it is saved).

    Raises:
        RecipeError: the run can't start here, the output folder is in use or holds another recipe's run, or it
            diverged.
        OutputError: a file can't be written.
        OutOfMemoryError: in which part, and what takes less.
    """
    console = console or Console(quiet=not ranks.is_main())
    if scene is None:
        preflight.check_recipe(recipe)
    ranks.rows(recipe.rollout.batch)  # raises if they can't be divided
    try:
        with lock_folder(recipe.output):
            return _run(recipe, scene, console)
    except OutOfMemoryError as error:
        message = str(error)  # alone: the error's frames hold the tensors of the run
    gpu = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else None
    with console.status(f"{message}\nwhat takes less is counted"):
        advice = memory_advice(recipe, ranks.count(), gpu, "cpu" if gpu is None else "cuda")
    raise OutOfMemoryError("\n".join([message, *advice]))


def _run(recipe: Recipe, scene: components.RunComponents | None, console: Console) -> dict[str, Any] | None:
    began = time.monotonic()
    torch.set_num_threads(recipe.threads)
    with memory_of("loading"):
        parts = scene or components.load(recipe)
    for source, texts in {recipe.prompts: parts.texts, recipe.heldout: [p.text for p in parts.heldout]}.items():
        if line := repetitions(source, texts):
            console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    components.check_reward(recipe, parts)
    srpo_support.check_guidance_is_input(recipe, parts.module)
    validation_rounds.check_guards(recipe, parts)
    training = TrainingState.start(recipe, parts.module)
    log = Log(recipe.output / METRICS)
    final_record = _final_record(log)
    if resume(recipe, training, partial(console.print, style="yellow", highlight=False)):
        if final_record and (
            training.iteration == recipe.iterations or training.early_stopping.stops(recipe.guards.patience)
        ):
            log.append(final_record)
            return _print_summary(recipe, console, final_record, "this run is finished; --overwrite runs it again")
        console.print(f"goes on from iteration {training.iteration} in {recipe.output}")
    else:
        start_from(recipe, training)
    spent, every = training.seconds, range(1, recipe.iterations + 1)  # in the same batches wherever it goes on
    prompts = needed_prompts(parts.heldout, recipe.evaluation.images) + needed_prompts(
        parts.validation, recipe.guards.images
    )
    components.open_prompt_cache(recipe, parts)
    with console.status("one model call forward and backward"):
        trial.check_gradient_is_finite(recipe, parts, partial(console.print, highlight=False))
    if compile_trial.applies(recipe, parts):
        with console.status("model calls are timed, eager and compiled"), memory_of("the compile trial"):
            left = recipe.iterations - training.iteration
            compile_trial.choose(recipe, parts, left, partial(console.print, highlight=False))
    with console.status("prompts are encoded"), memory_of("encoding the prompts"):
        components.encode_prompts(
            recipe, parts, prompts, (iteration_generator(recipe.seed, number, "prompts") for number in every)
        )
    if training.before is None:
        with console.status("held-out images of the untuned model"):
            training.before = evaluate(recipe, parts).to_dict()
        training.seconds = time.monotonic() - began
        save(recipe, training)
    method = type(recipe.method).__name__
    with progress_bar(console, method, recipe.iterations, training.iteration) as advance:
        validate = validation_rounds.validation_callback(recipe, parts, training, partial(_print_validation, console))
        complete = train(recipe, parts, training, partial(_show, training, console, advance), validate)
    if not complete:
        console.print(f"interrupted at iteration {training.iteration}, saved: the same command goes on from there")
        return None
    evaluation = _save_results(recipe, parts, training, console)
    evaluation["seconds"] = round(spent + time.monotonic() - began, 1)
    log.append(evaluation)
    if ranks.is_main():
        with storage_errors(recipe.output / "reward.png"):
            run_report.draw_curve(recipe.output / "reward.png", _run_title(recipe, training), log.read())
            run_report.draw_held_out(recipe.output / "heldout.png", _run_title(recipe, training), evaluation)
    return _print_summary(recipe, console, evaluation, "")


def _print_validation(console: Console, result: validation_rounds.ValidationResult) -> None:
    console.print(validation_report.validation_line(result), highlight=False, soft_wrap=True)


def _final_record(log: Log) -> dict[str, Any] | None:
    """Return the evaluation at the end of the log, if there is one."""
    lines = log.read()
    return lines[-1] if lines and lines[-1]["kind"] == "evaluation" else None


def _save_results(
    recipe: Recipe, parts: components.RunComponents, training: TrainingState, console: Console
) -> dict[str, Any]:
    """Put the averaged weights into the pipeline, save and evaluate them, and draw the pictures."""
    if recipe.guards.patience is not None:
        restore_best(recipe, training)
    sharding.release(parts.module)
    with torch.no_grad():
        for parameter, average in zip(training.local, training.ema.shadow_params, strict=True):
            parameter.copy_(average)
    with storage_errors(recipe.output / "transformer"):
        lora.save_trained(parts.pipe, recipe.train, recipe.output / "transformer")
    write_atomically(
        recipe.output / "recipe.json", lambda path: path.write_text(json.dumps(recipe.to_dict(), indent=1) + "\n")
    )
    with console.status("held-out images of the tuned model"):
        after = evaluate(recipe, parts)
    assert training.before is not None, "the untuned model is evaluated before the first iteration"
    before = HeldOutScores.from_dict(training.before)
    if ranks.is_main():
        plan = recipe.method.draw(recipe.rollout.steps, iteration_generator(recipe.seed, 1, "plan"))
        with storage_errors(recipe.output / "samples.png"):
            run_report.draw_samples(recipe.output / "samples.png", _run_title(recipe, training), before, after)
            plan.draw(recipe.output / "plan.svg")
    counts = {"iterations": training.iteration, "skipped": training.skipped, "range": range_left(recipe, training)}
    return {**compare(before, after), **counts, **validation_rounds.guards_summary(recipe, parts, training)}


def _run_title(recipe: Recipe, training: TrainingState) -> str:
    length = f"{training.iteration} iterations of {recipe.rollout.batch}"
    return f"{type(recipe.method).__name__} on {recipe.model}, {length}"


def _print_summary(recipe: Recipe, console: Console, evaluation: dict[str, Any], remark: str) -> dict[str, Any]:
    """Print the closing table and where the files are."""
    console.print(run_report.results_table(evaluation))
    for line in (run_report.verdict(evaluation), *run_report.remarks(evaluation)):
        console.print(line, highlight=False)
    if evaluation["skipped"]:
        lines = [line for line in Log(recipe.output / METRICS).read() if line.get("bad")]
        parts = Counter(line["bad"][0]["part"] for line in lines)
        causes = ", ".join(f"{part} {count}" for part, count in parts.items())
        console.print(
            f"[bold red]skipped iterations: {evaluation['skipped']}[/] (not finite: {causes})", highlight=False
        )
    if left := range_report(recipe.output, evaluation.get("range")):
        console.print(left, style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{evaluation['seconds']:.0f} s. In {recipe.output}: samples.png, reward.png, heldout.png, plan.svg, "
        "metrics.jsonl, transformer/" + (f"\n{remark}" if remark else ""),
        highlight=False,
    )
    return evaluation


def _show(training: TrainingState, console: Console, advance: Advance, record: StepRecord) -> None:
    """Show reward, loss, gradient norm and skipped iterations on the progress bar."""
    figures = f"reward {record.reward:.4f} loss {record.loss:.3f} |g| {record.grad_norm:.3g}"
    figures += f" [bold red]skipped {training.skipped}[/]" if training.skipped else ""
    advance(figures=figures, now=record.skipped)
    if record.idle:
        message = missing_gradients.warning(record.idle, len(training.parameters))
        console.print(f"iteration {record.iteration}: {message}", style="yellow", markup=False, highlight=False)
    for bad in record.bad:
        times = ", ".join(map(str, record.times))
        message = f"iteration {record.iteration} skipped: {bad}; the plan's times are {times}"
        console.print(message, style="bold red", markup=False, highlight=False, soft_wrap=True)
