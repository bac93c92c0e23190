"""Trackers, each with its own library and without a network: what they keep is what metrics.jsonl says."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.builders import toy_world
from trajsurgery import Recipe, RecipeError, Trainer
from trajsurgery.runs import trackers
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.settings import Evaluation, Guards

# their own, about what they call
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

RUN = """
import sys
from pathlib import Path
from tests.runs.test_trackers import train
train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
"""


def recipe_of(output: Path, tracker: Any, iterations: int = 4) -> Recipe:
    """A run with a validation round and two sheets."""
    evaluation = Evaluation(images=4, steps=5, batch=4, pictures=4, sheet_every=2, sheet_images=2)
    guards = Guards(every=2, images=4)
    changes: dict[str, Any] = {"iterations": iterations, "evaluation": evaluation, "guards": guards}
    return toy_world.recipe(output, tracker=(tracker,), **changes)


def train(output: Path, tracker: str, iterations: int = 4) -> list[dict[str, Any]]:
    """Run it; return the log."""
    recipe = recipe_of(output, tracker, iterations)
    world = replace(toy_world.world(recipe), metrics={"held": toy_world.LikesRed()}, validation=toy_world.PROMPTS)
    Trainer(recipe, components=world, console=Console(quiet=True)).train()
    return Log(output / METRICS).read()


def in_a_process(output: Path, tracker: str, environment: dict[str, str], iterations: int = 4) -> list[dict[str, Any]]:
    """The same in a process of its own, since these libraries start threads and services."""
    command = [sys.executable, "-c", RUN, str(output), tracker, str(iterations)]
    root = Path(__file__).parents[2]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(output.parent), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Log(output / METRICS).read()


def rewards(log: list[dict[str, Any]]) -> dict[int, float]:
    return {record["iteration"]: record["reward"] for record in log if record["kind"] == "iteration"}


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = train(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    logged = {event.step: event.value for event in events.Scalars("train/reward")}
    assert logged == pytest.approx(rewards(log))
    look = [record for record in log if record["kind"] == "look"]
    assert [e.step for e in events.Scalars("validation/held")] == [record["iteration"] for record in look]
    assert events.Scalars("heldout/reward_after")[0].value == pytest.approx(log[-1]["reward_after"])
    assert sorted({e.step for tag in events.Tags()["images"] for e in events.Images(tag)}) == [0, 2, 4]
    assert "LeapAlign" in str(events.Tensors("recipe/text_summary")[0])


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after 7 bytes, in blocks of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # a header does not fit: the next block
            place += 2**15 - place % 2**15
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def test_wandb_offline_and_resumed(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    in_a_process(tmp_path / "run", "wandb", environment, iterations=2)
    log = in_a_process(tmp_path / "run", "wandb", environment)
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # one run, gone on with
    history, configs = dict[int, float](), list[str]()
    for file in files:
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            if "train/reward" in items:
                history[record.history.step.num or items["_step"]] = items["train/reward"]
            configs += [item.key for item in record.run.config.update]
    assert history == pytest.approx(rewards(log))
    assert {"method", "rollout", "optimiser"} <= set(configs)
    assert list((tmp_path / "run/wandb").glob("offline-run-*/files/media/images/samples*.png"))


def test_trackio(tmp_path: Path) -> None:
    log = in_a_process(tmp_path / "run", "trackio", {"TRACKIO_DIR": str(tmp_path / "trackio")})
    database = sqlite3.connect(tmp_path / "trackio/trajsurgery.db")
    rows = [(step, json.loads(values)) for step, values in database.execute("select step, metrics from metrics")]
    database.close()
    assert {s: v["train/reward"] for s, v in rows if "train/reward" in v} == pytest.approx(rewards(log))
    assert list((tmp_path / "trackio/media").rglob("*.png"))


def test_videos_move(tmp_path: Path) -> None:
    """TensorBoard shows frames side by side; the others take a GIF."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    videos = torch.randint(256, (2, 5, 3, 8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    writer = trackers.TensorBoard(toy_world.recipe(tmp_path), "")
    writer.pictures("samples", ["a", "b"], videos, 3)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    image = events.Images(events.Tags()["images"][0])[0]
    assert (image.width, image.height) == (2 * 5 * 12, 8)
    with Image.open(trackers._as_media(videos[0])) as film:
        assert film.n_frames == 5  # pyright: ignore[reportAttributeAccessIssue]


def test_a_missing_tracker_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe = recipe_of(tmp_path, "wandb")
    with pytest.raises(RecipeError, match=r"--tracker wandb: not installed\. pip install 'trajsurgery\[trackers\]'"):
        Trainer(recipe, components=toy_world.world(recipe)).train()
    assert not (tmp_path / METRICS).exists()
