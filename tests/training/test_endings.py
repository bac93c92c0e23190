"""Runs that diverge or train nothing: what they say, what they keep, how to go on."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.builders import toy_world
from tests.training.test_bad_numbers import NotOfBlue
from trajsurgery import RecipeError
from trajsurgery.cli.train_command import main
from trajsurgery.errors import DivergedError
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.run_log import METRICS, Log
from trajsurgery.training.settings import Optimiser


def run(settings: Recipe, **changes: Any) -> tuple[dict[str, Any] | None, str]:
    out = io.StringIO()
    world = replace(toy_world.world(settings), **changes)
    return main(settings, world, Console(file=out, width=1000)), out.getvalue()


def test_a_rate_that_is_far_too_high_names_the_cause(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as error:
        run(toy_world.recipe(tmp_path, optimiser=Optimiser(rate=1e3), save_every=1))
    message = str(error.value)
    for words in (
        "the run stopped at iteration 4, after 3 in a row",
        "the velocity at t = 5 is not finite for",
        "The weights are finite, unchanged since iteration 1",
        "lower --optimiser.rate",
    ):
        assert words in message
    assert "good" not in message


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
