"""What a run prints: a progress bar with the latest figures, validation rounds, warnings, the closing table."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from torch import Tensor

from trajsurgery.evaluation.validation_rounds import ValidationResult
from trajsurgery.runs.callbacks import TrainerCallback, TrainerView
from trajsurgery.runs.reports import run_report, validation_report
from trajsurgery.training.checkpoints.checkpoint import SHEETS
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.endings import range_report
from trajsurgery.training.faults import missing_gradients
from trajsurgery.training.progress_bar import Advance, progress_bar
from trajsurgery.training.step_record import StepRecord

WINDOW = 20
"""Iterations of the moving means."""


def default_console(quiet: bool) -> Console:
    """Return a console: a terminal's, or plain lines in a log and in a notebook."""
    console = Console(quiet=quiet)
    if not console.is_jupyter:
        return console
    return Console(quiet=quiet, force_jupyter=False, force_terminal=False, width=console.width)


class ConsoleOutput(TrainerCallback):
    """Prints to a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.heldout: float | None = None
        """The newest mean reward on validation prompts (`--guards.every`)."""
        self._stack = ExitStack()
        self._advance: Advance | None = None
        self._recent = deque[StepRecord](maxlen=WINDOW)

    def on_train_begin(self, trainer: TrainerView) -> None:
        recipe, state = trainer.recipe, trainer.state
        bar = progress_bar(self.console, type(recipe.method).__name__, recipe.iterations, state.iteration)
        self._advance = self._stack.enter_context(bar)

    def on_step_end(self, trainer: TrainerView, record: StepRecord) -> None:
        assert self._advance is not None
        self._recent.append(record)
        self._advance(figures=self._figures(trainer, record), now=record.skipped)
        if record.idle:
            message = missing_gradients.warning(record.idle, len(trainer.state.parameters))
            self._warn(f"iteration {record.iteration}: {message}", "yellow")
        for bad in record.bad:
            times = ", ".join(map(str, record.times))
            self._warn(f"iteration {record.iteration} skipped: {bad}; the plan's times are {times}", "bold red")

    def _figures(self, trainer: TrainerView, record: StepRecord) -> str:
        """Return the figures beside the bar: means over the last iterations, and what stands now."""
        seconds = sum(r.seconds for r in self._recent)
        rate = len(self._recent) * trainer.recipe.rollout.batch / seconds if seconds else 0.0
        reward = fmean(r.reward for r in self._recent)
        parts = [f"reward {reward:.4f}"]
        parts += [] if self.heldout is None else [f"held-out {self.heldout:.4f}"]
        parts += [f"loss {record.loss:.3f}", f"|g| {record.grad_norm:.3g}"]
        parts += [f"{rate:.3g} images/s", f"{record.memory:.1f} GiB"]
        parts += [f"[bold red]skipped {trainer.state.skipped}[/]"] if trainer.state.skipped else []
        return " ".join(parts)

    def on_sheet(self, trainer: TrainerView, iteration: int, prompts: Sequence[str], images: Tensor) -> None:
        path = trainer.recipe.output / SHEETS / f"{iteration:06d}" / "sheet.png"
        self.console.print(f"iteration {iteration}: {path}", highlight=False, soft_wrap=True)

    def on_evaluate(self, trainer: TrainerView, record: Mapping[str, Any]) -> None:
        if record["kind"] == "look":
            self.heldout = record["reward"]
            line = validation_report.validation_line(ValidationResult(**record))
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: TrainerView, evaluation: Mapping[str, Any] | None) -> None:
        self.on_exit(trainer)
        if evaluation is None:
            iteration = trainer.state.iteration
            self.console.print(f"interrupted at iteration {iteration}, saved: the same command goes on from there")
        else:
            self._summary(trainer.recipe.output, evaluation, trainer.remark)

    def on_exit(self, trainer: TrainerView) -> None:
        self._stack.close()

    def _warn(self, text: str, style: str) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _summary(self, output: Path, evaluation: Mapping[str, Any], remark: str) -> None:
        """Print the closing table and where the files are."""
        self.console.print(run_report.results_table(evaluation))
        for line in (run_report.verdict(evaluation), *run_report.remarks(evaluation)):
            self.console.print(line, highlight=False)
        if evaluation["skipped"]:
            lines = [line for line in Log(output / METRICS).read() if line.get("bad")]
            parts = Counter(line["bad"][0]["part"] for line in lines)
            causes = ", ".join(f"{part} {count}" for part, count in parts.items())
            text = f"[bold red]skipped iterations: {evaluation['skipped']}[/] (not finite: {causes})"
            self.console.print(text, highlight=False)
        if left := range_report(output, evaluation.get("range")):
            self._warn(left, "bold red")
        self.console.print(
            f"{evaluation['seconds']:.0f} s. In {output}: report.html, samples.png, reward.png, heldout.png, plan.svg, "
            "metrics.jsonl, transformer/" + (f"\n{remark}" if remark else ""),
            highlight=False,
        )
