"""What a run calls as it goes: the events of transformers' and trl's trainers, by the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trajsurgery.training.step_record import StepRecord

if TYPE_CHECKING:
    from trajsurgery.runs.trainer import Trainer


class TrainerCallback:
    """Override the events that you need. `trainer.should_stop = True` ends the run after the current iteration.

    Of several processes each calls its own callbacks; `trainer.is_main` is true in one of them.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """The untuned model is evaluated, or a checkpoint is read; the first iteration comes next."""

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """An iteration is over, its record in metrics.jsonl."""

    def on_evaluate(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        """A validation round (`kind` "look") or the closing evaluation ("evaluation"): its line of metrics.jsonl."""

    def on_sheet(self, trainer: Trainer, iteration: int, prompts: Sequence[str], images: Tensor) -> None:
        """A contact sheet of fixed prompts was made with the averaged weights.

        Args:
            images: UInt8[images 3 h w]; of videos UInt8[images frames 3 h w].
        """

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        """A checkpoint was written."""

    def on_train_end(self, trainer: Trainer, evaluation: Mapping[str, Any] | None) -> None:
        """The run is complete, with the closing evaluation; or it was interrupted and saved (None)."""

    def on_exit(self, trainer: Trainer) -> None:
        """The last event, also after an error: close files here."""
