"""What a run calls as it goes: the events of transformers' and trl's trainers, by the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trajsurgery.training.checkpoints.run_log import Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import RunComponents
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.step_record import StepRecord


class TrainerView(Protocol):
    """What callbacks see of a `Trainer`."""

    recipe: Recipe
    should_stop: bool
    """Set it to end the run after the current iteration."""
    log: Log
    """metrics.jsonl."""
    remark: str
    """What the closing summary adds."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        ...

    @property
    def components(self) -> RunComponents:
        """Pipeline, rewards and prompts."""
        ...

    @property
    def state(self) -> TrainingState:
        """Weights, averages, optimiser and counters."""
        ...


class TrainerCallback:
    """Override the events that you need. `trainer.should_stop = True` ends the run after the current iteration.

    Of several processes each calls its own callbacks; `trainer.is_main` is true in one of them.
    """

    def on_train_begin(self, trainer: TrainerView) -> None:
        """The untuned model is evaluated, or a checkpoint is read; the first iteration comes next."""

    def on_step_end(self, trainer: TrainerView, record: StepRecord) -> None:
        """An iteration is over, its record in metrics.jsonl."""

    def on_evaluate(self, trainer: TrainerView, record: Mapping[str, Any]) -> None:
        """A validation round (`kind` "look") or the closing evaluation ("evaluation"): its line of metrics.jsonl."""

    def on_sheet(self, trainer: TrainerView, iteration: int, prompts: Sequence[str], images: Tensor) -> None:
        """A contact sheet of fixed prompts was made with the averaged weights.

        Args:
            images: UInt8[images 3 h w]; of videos UInt8[images frames 3 h w].
        """

    def on_save(self, trainer: TrainerView, folder: Path) -> None:
        """A checkpoint was written."""

    def on_train_end(self, trainer: TrainerView, evaluation: Mapping[str, Any] | None) -> None:
        """The run is complete, with the closing evaluation; or it was interrupted and saved (None)."""

    def on_exit(self, trainer: TrainerView) -> None:
        """The last event, also after an error: close files here."""
