"""A run that was killed and resumed equals an uninterrupted run bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import toy_world
from trajsurgery import DRaFTLV, DRTune, LeapAlign, RecipeError, ReFL
from trajsurgery.cli.train_command import main
from trajsurgery.evaluation.held_out import evaluate
from trajsurgery.training.checkpoint import (
    CHECKPOINT,
    METRICS,
    Log,
    TrainingState,
    discard,
    resume,
    save,
    write_atomically,
)
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.settings import Optimiser
from trajsurgery.training.training_loop import StepRecord, train

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Stands in for SIGKILL inside one process."""


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a nested state, in order."""
    if isinstance(state, Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in inner for tensor in tensors(value)]


def equal_with_nan(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal bit for bit, NaN equal to NaN (diversity of the only image of a prompt)."""
    return torch.equal(a, b) if not a.is_floating_point() else torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that two runs ended alike: weights, EMA, optimiser, iteration, and the log except its times."""
    first, second = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (a, b))
    for name in ("weights", "ema", "optimiser", "before"):
        assert tensors(first[name])
        assert all(map(equal_with_nan, tensors(first[name]), tensors(second[name]))), name
    assert [first[name] for name in ("iteration", "skipped")] == [second[name] for name in ("iteration", "skipped")]
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in Log(f / METRICS).read()] for f in (a, b)]
    assert logs[0] == logs[1]


def killed_at(
    recipe: Recipe,
    number: int,
    validating: Callable[[Any, TrainingState], Callable[[], bool]] = lambda *_: lambda: True,
) -> None:
    """Train up to an iteration, stop without saving, and leave a torn line at the end of the log."""
    world = toy_world.world(recipe)
    training = TrainingState.start(recipe, world.module)

    def watch(record: StepRecord) -> None:
        if record.iteration == number:
            raise Killed

    resume(recipe, training)
    training.before = training.before or evaluate(recipe, world).to_dict()
    save(recipe, training)
    with pytest.raises(Killed):
        train(recipe, world, training, watch, validating(world, training))
    with (recipe.output / METRICS).open("a") as log:
        log.write('{"kind": "iteration", "itera')


@pytest.mark.parametrize(
    "method", [LeapAlign(), DRTune(last=3), ReFL(last=3), DRaFTLV()], ids=lambda m: type(m).__name__
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, method: Method) -> None:
    whole, interrupted = toy_world.recipe(tmp_path / "whole", method), toy_world.recipe(tmp_path / "torn", method)
    main(whole, toy_world.world(whole))
    killed_at(interrupted, 3)
    killed_at(interrupted, 5)
    main(interrupted, toy_world.world(interrupted))
    assert_same_run(whole.output, interrupted.output)


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from pathlib import Path
from tests.builders import toy_world
from trajsurgery.cli.train_command import main
recipe = toy_world.recipe(Path(sys.argv[2]), iterations=12, save_every=5)
print("ready", flush=True)
sys.exit(0 if main(recipe, toy_world.world(recipe)) else 130)
"""


def run_script(output: Path, until: int | None, number: int = signal.SIGKILL) -> int:
    """Run SCRIPT in a process and return its exit code; send it a signal once its log has `until` lines."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(ROOT), str(output)], stdout=subprocess.DEVNULL
    )
    try:
        while until is not None and process.poll() is None:
            log = output / METRICS
            if log.exists() and log.read_bytes().count(b"\n") >= until:
                process.send_signal(number)
                break
            time.sleep(0.005)
        return process.wait(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()


@pytest.mark.slow
def test_sigkill_and_sigterm(tmp_path: Path) -> None:
    whole, interrupted = tmp_path / "whole", tmp_path / "torn"
    assert run_script(whole, None) == 0
    assert run_script(interrupted, 3) == -signal.SIGKILL
    assert run_script(interrupted, 8, signal.SIGTERM) == 130
    done = torch.load(interrupted / CHECKPOINT, weights_only=True)["iteration"]
    assert done == len(Log(interrupted / METRICS).read()), "an interrupted run saves its last iteration"
    assert run_script(interrupted, None) == 0
    assert_same_run(whole, interrupted)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (interrupted / weights).read_bytes()


def test_another_recipe_is_refused_with_the_differences(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=2)
    main(recipe, toy_world.world(recipe))
    other = replace(recipe, method=DRTune(), optimiser=Optimiser(rate=0.5), seed=1)
    with pytest.raises(RecipeError) as error:
        main(other, toy_world.world(other))
    message = str(error.value)
    for words in ("method.name: LeapAlign there, DRTune here", "optimiser.rate: 0.01 there, 0.5 here", "seed: 0 there"):
        assert words in message
    assert "--overwrite" in message
    assert "--output" in message
    assert main(replace(other, overwrite=True), toy_world.world(other)) is not None


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=2)
    first = main(recipe, toy_world.world(recipe))
    log = (tmp_path / METRICS).read_text()
    monkeypatch.setattr("trajsurgery.cli.train_command.train", lambda *_: pytest.fail("it trained again"))
    assert main(recipe, toy_world.world(recipe)) == json.loads(json.dumps(first))
    assert (tmp_path / METRICS).read_text() == log
    monkeypatch.undo()
    assert main(replace(recipe, overwrite=True), toy_world.world(recipe)) is not None
    assert len(Log(tmp_path / METRICS).read()) == 3


def test_a_finished_run_continues_to_more_iterations(tmp_path: Path) -> None:
    whole = toy_world.recipe(tmp_path / "whole", iterations=5)
    extended = toy_world.recipe(tmp_path / "part", iterations=3)
    main(whole, toy_world.world(whole))
    main(extended, toy_world.world(extended))
    main(replace(extended, iterations=5), toy_world.world(extended))
    assert_same_run(whole.output, extended.output)
    with pytest.raises(RecipeError, match="holds 5 iterations of this recipe, more than the 3"):
        main(extended, toy_world.world(extended))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda partial: partial.write_text("old"))

    def write_half(partial: Path) -> None:
        partial.write_text("ne")
        raise Killed

    with pytest.raises(Killed):
        write_atomically(path, write_half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def drop_a_weight(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({**state, "weights": state["weights"][1:]}, path)


@pytest.mark.parametrize("corrupt, message", [(truncate, "can't be read"), (drop_a_weight, "does not fit the model")])
def test_an_unusable_checkpoint_is_refused_with_the_reason(
    tmp_path: Path, corrupt: Callable[[Path], None], message: str
) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=1)
    world = toy_world.world(recipe)
    save(recipe, TrainingState.start(recipe, world.module))
    corrupt(tmp_path / CHECKPOINT)
    with pytest.raises(RecipeError, match=f"{message}.*--overwrite"):
        resume(recipe, TrainingState.start(recipe, world.module))


def test_the_log_is_cut_back_and_writes_nan_as_null(tmp_path: Path) -> None:
    log = Log(tmp_path / METRICS)
    for i in range(1, 5):
        log.append({"kind": "iteration", "iteration": i, "loss": float("nan") if i == 2 else 0.5})
    log.append({"kind": "evaluation"})
    with log.path.open("a") as file:
        file.write('{"kind":')
    log.cut(3)
    assert log.read() == [{"kind": "iteration", "iteration": i, "loss": None if i == 2 else 0.5} for i in (1, 2, 3)]


def test_discard_leaves_other_files(tmp_path: Path) -> None:
    for name in (CHECKPOINT, METRICS, f"{CHECKPOINT}.12.partial", "notes.txt"):
        (tmp_path / name).write_text("x")
    discard(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
