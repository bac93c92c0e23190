"""Runs that diverge or train nothing: what they say, what they keep, how to go on."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.builders import toy_world
from tests.training.test_bad_numbers import NotOfBlue
from trajsurgery import RecipeError
from trajsurgery.cli.train_command import main
from trajsurgery.errors import DivergedError
from trajsurgery.training.checkpoints.checkpoint import list_checkpoints
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.tensor_folder import read_tensors
from trajsurgery.training.faults.loss_range import BACK, LossRange
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Optimiser


def run(settings: Recipe, **changes: Any) -> tuple[dict[str, Any] | None, str]:
    out = io.StringIO()
    world = replace(toy_world.world(settings), **changes)
    return main(settings, world, Console(file=out, width=1000)), out.getvalue()


def weights(folder: Path) -> list[Tensor]:
    return list(read_tensors(folder, "weights.").values())


def untuned(settings: Recipe) -> list[Tensor]:
    return [p.detach() for p in toy_world.world(settings).module.parameters()]


def test_a_rate_that_is_far_too_high_ends_with_the_checkpoint_from_before(tmp_path: Path) -> None:
    settings = toy_world.recipe(tmp_path / "high", optimiser=Optimiser(rate=1e3), save_every=1)
    with pytest.raises(DivergedError) as error:
        run(settings)
    message = str(error.value)
    before = settings.output / "checkpoints/000000"
    for words in (
        "the velocity at t = 5 is not finite for",
        "The weights are finite, unchanged since iteration 1",
        "The loss left its range at iteration 2",
        f"--start {before}",
        "lower --optimiser.rate",
    ):
        assert words in message
    assert "good" not in message
    assert all(map(torch.equal, weights(before), untuned(settings)))
    again = toy_world.recipe(tmp_path / "lower", start=str(before), iterations=2)
    assert run(again)[0] is not None


def test_a_run_that_diverges_without_nan_says_so_and_keeps_the_checkpoint_from_before(tmp_path: Path) -> None:
    settings = toy_world.recipe(tmp_path, optimiser=Optimiser(rate=1.0), save_every=1, iterations=8)
    summary, printed = run(settings)
    assert summary is not None
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["000008", "000007", "000000"]
    assert f"The loss left its range at iteration 2; {tmp_path}/checkpoints/000000 is from before, and stays" in printed


def test_a_run_starts_with_the_weights_averages_and_moments_of_a_checkpoint(tmp_path: Path) -> None:
    first = toy_world.recipe(tmp_path / "first", iterations=3, save_every=3)
    run(first)
    folder = list_checkpoints(first.output)[0]
    second = toy_world.recipe(tmp_path / "second", start=str(folder), iterations=1, save_every=1)
    run(second)
    start = list_checkpoints(second.output)[-1]
    assert start.name == "000000"
    saved, begun = read_tensors(folder), read_tensors(start)
    assert saved.keys() == begun.keys()
    assert all(torch.equal(value, begun[name]) for name, value in saved.items())
    with pytest.raises(RecipeError, match="no whole checkpoint"):
        run(toy_world.recipe(tmp_path / "third", start=str(tmp_path / "gone")))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "all skipped": ({}, {"reward": NotOfBlue("")}, r"in each one numbers were not finite; in the last one the reward"),
    "closed hinge": ({"objective": {"threshold": -5.0}}, {}, r"Raise --objective\.threshold"),
    "steps too small": ({"optimiser": {"rate": 1e-30, "weight_decay": 0.0}}, {}, r"Raise --optimiser\.rate"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_in_which_nothing_trained_is_an_error(name: str, tmp_path: Path) -> None:
    changes, world, message = CASES[name]
    settings = toy_world.recipe(tmp_path, iterations=2)
    parts = {part: replace(getattr(settings, part), **fields) for part, fields in changes.items()}
    with pytest.raises(RecipeError, match=rf"nothing was trained in 2 iterations: .*{message}"):
        run(replace(settings, **parts), **world)
    assert all(line["kind"] != "evaluation" for line in Log(tmp_path / METRICS).read())


FINE = {"loss": 1.0, "norm": 2.0, "weight": 4.0, "closed": 0.0}


@pytest.mark.parametrize(
    "change, leaves",
    [
        ({}, False),
        ({"loss": 9.0}, False),
        ({"loss": 11.0}, True),
        ({"norm": 21.0}, True),
        ({"norm": math.nan}, True),
        ({"weight": 0.39}, True),
        ({"weight": 0.41}, False),
        ({"loss": 0.0, "norm": 0.0, "closed": 1.0}, False),
        ({"norm": 0.019}, True),
        ({"norm": 0.021}, False),
    ],
)
def test_the_range_is_left_by_one_iteration_and_returned_to_by_ten(change: dict[str, float], leaves: bool) -> None:
    watch = LossRange()
    for number in range(1, 6):
        watch.update(number, **FINE)
    watch.update(6, **FINE | change)
    assert watch.left == (6 if leaves else None)
    for number in range(7, 6 + BACK):
        watch.update(number, **FINE)
    assert watch.left == (6 if leaves else None)
    watch.update(6 + BACK, **FINE)
    assert watch.left is None
