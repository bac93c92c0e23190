"""Trackers: TensorBoard, Weights & Biases and trackio get a run's scalars, pictures and settings as it goes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.runs.callbacks import TrainerCallback, TrainerView
from trajsurgery.training.checkpoints.checkpoint import TRACKER_ID
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.step_record import StepRecord

PROJECT = "trajsurgery"
FIGURES = ("reward", "loss", "grad_norm", "clamped", "weight", "closed", "distance", "anchor", "memory", "seconds")
"""Fields of an iteration's record that are logged below train/."""

FRAMES_A_SECOND = 8


class Writer(Protocol):
    """One tracker's run."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        ...

    def pictures(self, name: str, captions: Sequence[str], images: Tensor, step: int) -> None:
        """Log images, UInt8[images 3 h w], or videos, UInt8[videos frames 3 h w]."""
        ...

    def close(self) -> None:
        """End the run."""
        ...


class TensorBoard:
    """Event files in OUTPUT/tensorboard."""

    def __init__(self, recipe: Recipe, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(recipe.output / "tensorboard")
        self._writer.add_text("recipe", f"```json\n{json.dumps(recipe.to_dict(), indent=1)}\n```")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def pictures(self, name: str, captions: Sequence[str], images: Tensor, step: int) -> None:
        """A video's frames stand side by side: its own form needs moviepy."""
        still = images if images.dim() == 4 else images.permute(0, 2, 3, 1, 4).flatten(3)
        self._writer.add_images(name, still, step)
        self._writer.add_text(f"{name}/prompts", "  \n".join(captions), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; the variables WANDB_PROJECT, WANDB_MODE and others count."""

    def __init__(self, recipe: Recipe, run_id: str) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        folder, settings = str(recipe.output), recipe.to_dict()
        self._wandb: Any = wandb
        self._run = wandb.init(
            project=project, name=recipe.output.name, id=run_id, resume="allow", dir=folder, config=settings
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, name: str, captions: Sequence[str], images: Tensor, step: int) -> None:
        kind = self._wandb.Image if images.dim() == 4 else self._wandb.Video
        media = [kind(_as_media(image), caption=text) for image, text in zip(images, captions, strict=True)]
        self._run.log({name: media}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, which keeps it on this machine, or where its variables TRACKIO_... say."""

    def __init__(self, recipe: Recipe, run_id: str) -> None:
        import trackio

        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{recipe.output.name}-{run_id}"
        self._trackio: Any = trackio
        self._run = trackio.init(project=project, name=name, resume="allow", config=recipe.to_dict(), embed=False)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, name: str, captions: Sequence[str], images: Tensor, step: int) -> None:
        kind = self._trackio.Image if images.dim() == 4 else self._trackio.Video
        for number, (image, text) in enumerate(zip(images, captions, strict=True)):
            self._run.log({f"{name}/{number}": kind(_as_media(image), caption=text)}, step=step)

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, type[TensorBoard | Wandb | Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def check_trackers(recipe: Recipe) -> None:
    """Raise if a tracker's package is missing.

    Raises:
        RecipeError: which, and the command that gets it.
    """
    missing = [name for name in recipe.tracker if find_spec(name) is None]
    if missing:
        raise RecipeError(f"--tracker {', '.join(missing)}: not installed. pip install 'trajsurgery[trackers]'")


class TrackerCallback(TrainerCallback):
    """Sends a run's records and contact sheets to trackers."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._writers: list[Writer] = []

    def on_train_begin(self, trainer: TrainerView) -> None:
        if trainer.is_main:
            run_id = _run_id(trainer.recipe.output)
            self._writers = [WRITERS[name](trainer.recipe, run_id) for name in dict.fromkeys(self._names)]

    def on_step_end(self, trainer: TrainerView, record: StepRecord) -> None:
        values = {f"train/{name}": getattr(record, name) for name in FIGURES}
        parts = {f"seconds/{name}": seconds for name, seconds in record.parts.items()}
        self._scalars({**values, "train/skipped": trainer.state.skipped, **parts}, record.iteration)

    def on_evaluate(self, trainer: TrainerView, record: Mapping[str, Any]) -> None:
        if record["kind"] == "look":
            values = {"reward": record["reward"], **record["metrics"], "rules": record["rule"]}
            self._scalars({f"validation/{name}": value for name, value in values.items()}, record["iteration"])
            return
        means = {f"heldout/{name}": record.get(name) for name in record if name.startswith(("reward_", "rule_"))}
        self._scalars(means, trainer.state.iteration)

    def on_sheet(self, trainer: TrainerView, iteration: int, prompts: Sequence[str], images: Tensor) -> None:
        for writer in self._writers:
            writer.pictures("samples", prompts, images, iteration)

    def on_exit(self, trainer: TrainerView) -> None:
        while self._writers:
            self._writers.pop().close()

    def _scalars(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for writer in self._writers:
            writer.scalars(numbers, step)


def _run_id(output: Path) -> str:
    """Return the id under which a tracker goes on with the run in a folder."""
    path = output / TRACKER_ID
    if not path.exists():
        write_atomically(path, lambda partial: partial.write_text(os.urandom(4).hex()))
    return path.read_text()


def _as_media(picture: Tensor) -> Any:
    """Return an image [3 h w] as an array [h w 3], a video [frames 3 h w] as the path of a GIF."""
    if picture.dim() == 3:
        return picture.permute(1, 2, 0).contiguous().numpy()
    import tempfile

    from PIL import Image

    frames = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in picture]
    path = Path(tempfile.mkdtemp()) / "video.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_A_SECOND, loop=0)
    return str(path)
