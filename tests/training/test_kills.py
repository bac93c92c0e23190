"""Killed and interrupted runs end like runs that are not. The study of 20 kills: benchmarks/engine/kills.py."""

from __future__ import annotations

import os
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
    (moment,) = kills.compare_runs(tmp_path, kills=1, iterations=24, ranks=1, seed=1)
    assert moment.writing
    interrupted = tmp_path / "interrupted"
    (process,) = kills.start(interrupted, 24, 1)
    try:
        while kills.count_lines(interrupted) < 7 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
    lines = [line for line in Log(interrupted / METRICS).read() if line["kind"] == "iteration"]
    assert len(lines) == load_checkpoint(interrupted)["iteration"] < 24, "an interrupted run saves its last iteration"
    kills.finish(kills.start(interrupted, 24, 1))
    assert_same_run(tmp_path / "whole", interrupted)


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
