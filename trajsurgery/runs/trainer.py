"""A run from start to end: evaluate, train, evaluate again, save. It resumes a run that was interrupted."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console

from trajsurgery.dry_run.memory_advice import memory_advice
from trajsurgery.errors import OutOfMemoryError, RecipeError
from trajsurgery.evaluation import validation_rounds
from trajsurgery.evaluation.held_out import evaluate, needed_prompts
from trajsurgery.rewards.loading import Reward
from trajsurgery.runs import contact_sheets, results
from trajsurgery.runs.callbacks import TrainerCallback
from trajsurgery.runs.console_output import ConsoleOutput, default_console
from trajsurgery.runs.own_parts import OwnParts
from trajsurgery.runs.reports.html_report import write_report
from trajsurgery.runs.run_info import write_run_info
from trajsurgery.runs.trackers import TrackerCallback, check_trackers
from trajsurgery.training import srpo_support
from trajsurgery.training.checkpoints.checkpoint import resume, save, start_from
from trajsurgery.training.checkpoints.output_files import lock_folder
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.checks import compile_trial, preflight, trial
from trajsurgery.training.components import RunComponents, check_reward, encode_prompts, load, open_prompt_cache
from trajsurgery.training.distributed import ranks
from trajsurgery.training.faults.memory_errors import memory_of
from trajsurgery.training.optimisers import rate_remark
from trajsurgery.training.prompts import repetitions
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.step_record import StepRecord
from trajsurgery.training.training_loop import iterate, iteration_generator


class Trainer:
    """Runs a recipe: `Trainer(recipe).train()`, or `for record in Trainer(recipe)`, which trains as it is read.

    A loop that is left early (break, an error, Ctrl-C) is saved; the same recipe goes on from there. Everything is
    written to `recipe.output`.

    Args:
        recipe: what to train, on which reward, for how long.
        pipe: a diffusers pipeline, instead of the one that `recipe.model` names. Its transformer trains; it stays
            usable, with its text encoders.
        reward: reward(images, prompts) -> scores, instead of the one that `recipe.reward` names.
        prompts: texts to train on, instead of the recipe's file.
        heldout: texts to evaluate on, likewise.
        callbacks: their events, see `TrainerCallback`.
        components: all of this at once, prepared (`trajsurgery.training.components.load`).
        console: where to print; Console(quiet=True) prints nothing. By default the first process prints.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        pipe: Any = None,
        reward: Reward | None = None,
        prompts: Sequence[str] | None = None,
        heldout: Sequence[str] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        components: RunComponents | None = None,
        console: Console | None = None,
    ) -> None:
        self._own = OwnParts(pipe, reward, prompts, heldout)
        self.recipe = self._own.named(recipe)
        self.console = console or default_console(quiet=not ranks.is_main())
        trackers = [TrackerCallback(recipe.tracker)] if recipe.tracker else []
        self.callbacks: list[TrainerCallback] = [ConsoleOutput(self.console), *trackers, *callbacks]
        self.should_stop = False
        """Set it to end the run after the current iteration."""
        self.evaluation: dict[str, Any] | None = None
        """The closing evaluation; None before the end, and if the run was interrupted."""
        self.log = Log(self.recipe.output / METRICS)
        """metrics.jsonl."""
        self.remark = ""
        """What the closing summary adds."""
        self._begun = False
        self._parts = components
        self._state: TrainingState | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return ranks.is_main()

    @property
    def components(self) -> RunComponents:
        """Pipeline, rewards and prompts. They are loaded when the run begins."""
        assert self._parts is not None, "the run has not begun"
        return self._parts

    @property
    def state(self) -> TrainingState:
        """Weights, averages, optimiser and counters. They exist once the run has begun."""
        assert self._state is not None, "the run has not begun"
        return self._state

    def train(self) -> dict[str, Any] | None:
        """Run the recipe to its end; return the evaluation's line of metrics.jsonl (None: interrupted, and saved).

        Raises:
            RecipeError: the run can't start here, the output folder is in use or holds another recipe's run, or it
                diverged.
            OutputError: a file can't be written.
            OutOfMemoryError: in which part, and what takes less.
        """
        for _ in self:
            pass
        return self.evaluation

    def __iter__(self) -> Iterator[StepRecord]:
        """Train; yield the record of each iteration. Raises as `train`, and a RecipeError the second time."""
        if self._begun:
            raise RecipeError("this Trainer has run; make another one, which goes on from the saved state.")
        self._begun = True
        return self._guarded()

    def _event(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self, *arguments)

    def _guarded(self) -> Generator[StepRecord]:
        """Lock the folder for the run; close the callbacks; say what takes less memory if there was not enough."""
        if self._parts is None:
            preflight.check_recipe(self.recipe, self._own.fields)
        check_trackers(self.recipe)
        ranks.rows(self.recipe.rollout.batch)  # raises if they can't be divided
        try:
            with lock_folder(self.recipe.output):
                yield from self._run()
            return
        except OutOfMemoryError as error:
            message = str(error)  # alone: the error's frames hold the tensors of the run
        finally:
            self._event("on_exit")
        gpu = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else None
        with self.console.status(f"{message}\nwhat takes less is counted"):
            advice = memory_advice(self.recipe, ranks.count(), gpu, "cpu" if gpu is None else "cuda")
        raise OutOfMemoryError("\n".join([message, *advice]))

    def _run(self) -> Generator[StepRecord]:
        began = time.monotonic()
        self._load()
        if self._is_finished():
            return
        spent = self.state.seconds
        self._prepare(began)
        self._event("on_train_begin")
        if not (yield from self._iterations()):
            self._end(None)
            return
        evaluation = results.save_results(self.recipe, self.components, self.state, self.console)
        self.evaluation = {**evaluation, "seconds": round(spent + time.monotonic() - began, 1)}
        self.log.append(self.evaluation)
        results.draw_results(self.recipe, self.state, self.evaluation, self.log)
        self._event("on_evaluate", self.evaluation)
        self._end(self.evaluation)

    def _end(self, evaluation: dict[str, Any] | None) -> None:
        if ranks.is_main():
            write_report(self.recipe.output)
        self._event("on_train_end", evaluation)

    def _load(self) -> None:
        """Load pipeline, rewards and prompts, and check them."""
        recipe, own = self.recipe, self._own
        torch.set_num_threads(recipe.threads)
        if self._parts is None:
            with memory_of("loading"):
                self._parts = load(recipe, own.pipe, own.reward, own.prompts, own.heldout_prompts)
        parts = self._parts
        if line := rate_remark(recipe.train, recipe.optimiser):
            self.console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
        for source, texts in {recipe.prompts: parts.texts, recipe.heldout: [p.text for p in parts.heldout]}.items():
            if line := repetitions(source, texts):
                self.console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
        check_reward(recipe, parts)
        srpo_support.check_guidance_is_input(recipe, parts.module)
        validation_rounds.check_guards(recipe, parts)
        self._state = TrainingState.start(recipe, parts.module)
        self._state.on_save = partial(self._event, "on_save")

    def _is_finished(self) -> bool:
        """Read the newest checkpoint, if there is one; whether the run it is of has ended."""
        recipe, state = self.recipe, self.state
        final_record = self.log.final()
        if not resume(recipe, state, partial(self.console.print, style="yellow", highlight=False)):
            start_from(recipe, state)
            return False
        ended = state.iteration == recipe.iterations or state.early_stopping.stops(recipe.guards.patience)
        if final_record and ended:
            self.log.append(final_record)
            self.evaluation, self.remark = final_record, "this run is finished; --overwrite runs it again"
            self._event("on_train_end", final_record)
            return True
        self.console.print(f"goes on from iteration {state.iteration} in {recipe.output}")
        return False

    def _prepare(self, began: float) -> None:
        """Encode the prompts, make the trials, evaluate the untuned model."""
        recipe, parts, state, console = self.recipe, self.components, self.state, self.console
        say = partial(console.print, highlight=False)
        results.save_recipe(recipe)
        write_run_info(recipe.output, parts.device)
        pictures = max(recipe.evaluation.images, recipe.evaluation.sheet_images)
        prompts = needed_prompts(parts.heldout, pictures) + needed_prompts(parts.validation, recipe.guards.images)
        open_prompt_cache(recipe, parts)
        with console.status("one model call forward and backward"):
            trial.check_gradient_is_finite(recipe, parts, say)
        if compile_trial.applies(recipe, parts):
            with console.status("model calls are timed, eager and compiled"), memory_of("the compile trial"):
                compile_trial.choose(recipe, parts, recipe.iterations - state.iteration, say)
        every = range(1, recipe.iterations + 1)  # in the same batches wherever it goes on
        with console.status("prompts are encoded"), memory_of("encoding the prompts"):
            draws = (iteration_generator(recipe.seed, number, "prompts") for number in every)
            encode_prompts(recipe, parts, prompts, draws)
        if state.before is None:
            with console.status("held-out images of the untuned model"):
                state.before = evaluate(recipe, parts).to_dict()
            state.seconds = time.monotonic() - began
            save(recipe, state)

    def _iterations(self) -> Generator[StepRecord, None, bool]:
        """Yield the records; return whether the run is complete."""
        recipe, parts, state = self.recipe, self.components, self.state
        validate = validation_rounds.validation_callback(recipe, parts, state, self._validated)
        steps = iterate(recipe, parts, state, lambda: validate() and not self.should_stop)
        self._make_sheet()
        try:
            while True:
                try:
                    record = next(steps)
                except StopIteration as end:
                    return end.value
                self._event("on_step_end", record)
                self._make_sheet()
                yield record
        finally:
            steps.close()

    def _validated(self, result: validation_rounds.ValidationResult) -> None:
        self._event("on_evaluate", asdict(result))

    def _make_sheet(self) -> None:
        """Make a contact sheet if one is due."""
        if not self.state.finite or not contact_sheets.is_due(self.recipe, self.state.iteration):
            return
        began = time.monotonic()
        scores = contact_sheets.make_sheet(self.recipe, self.components, self.state)
        self.state.seconds += time.monotonic() - began
        self._event("on_sheet", self.state.iteration, scores.texts, scores.pictures)
