"""Killed and interrupted runs end like runs that are not. The study of 20 kills: benchmarks/engine/kills.py."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from benchmarks.engine import kills
from tests.builders import toy_world
from tests.builders.saved_runs import assert_same_run, load_checkpoint
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.training_loop import StepRecord, train


@pytest.mark.slow
def test_sigkill_within_a_write_and_sigterm_lose_nothing(tmp_path: Path) -> None:
    whole, stopped, iterations = tmp_path / "whole", tmp_path / "stopped", 16
    kills.finish(kills.start(whole, iterations, 1))
    moment = kills.kill_once(stopped, iterations, 1, random.Random(1), in_write=True)
    assert moment is not None
    assert moment.writing
    (process,) = kills.start(stopped, iterations, 1)
    while kills.count_lines(stopped) < moment.lines + 2 and process.is_alive():
        time.sleep(0.005)
    process.terminate()
    process.join()
    assert process.exitcode == 130
    lines = [line for line in Log(stopped / METRICS).read() if line["kind"] == "iteration"]
    assert len(lines) == load_checkpoint(stopped)["iteration"] < iterations, (
        "an interrupted run saves its last iteration"
    )
    kills.finish(kills.start(stopped, iterations, 1))
    assert_same_run(whole, stopped)


def test_an_interruption_in_the_last_iteration_is_one(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=2)
    world = toy_world.world(recipe)
    training = TrainingState.start(recipe, world.module)

    def interrupt(record: StepRecord) -> None:
        if record.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(recipe, world, training, interrupt)
    assert load_checkpoint(tmp_path)["iteration"] == 2
    assert train(recipe, world, training, interrupt), "it goes on to the evaluation"
