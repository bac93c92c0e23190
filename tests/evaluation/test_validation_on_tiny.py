"""The tiny model with a reward that can be hacked: without guards it rises while the held-out scorer falls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from trajsurgery import LeapAlign, tiny
from trajsurgery.evaluation import validation_rounds
from trajsurgery.training import components
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Evaluation, Guards, Objective, Optimiser, Rollout
from trajsurgery.training.training_loop import train

HACKED, HELD = "tests.evaluation.test_validation_on_tiny:Brightness", "tiny:scorer_b"


class Brightness:
    """reward(images, prompts): the mean of all pixels, whatever the prompt."""

    threshold = 1.0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


def short_run(
    output: Path, reward: str = HACKED, **guards: Any
) -> tuple[Recipe, TrainingState, list[Mapping[str, Any]]]:
    """Train for 16 iterations with a validation round every four."""
    recipe = Recipe(
        method=LeapAlign(),
        reward=reward,
        prompts="tiny:even",
        objective=Objective(threshold=1.0 if reward == HACKED else 1.5, tau=0.02),
        rollout=Rollout(steps=8, batch=8),
        optimiser=Optimiser(rate=3e-4),
        evaluation=Evaluation(images=12, steps=8, batch=24, metrics=(HELD,)),
        guards=Guards(**{"every": 4, "images": 24, **guards}),
        iterations=16,
        ema=0.5,
        save_every=100,
        output=output,
    )
    world = components.load(recipe)
    validation_rounds.check_guards(recipe, world)
    training = TrainingState.start(recipe, world.module)
    validate = validation_rounds.validation_callback(recipe, world, training, lambda _: None)
    assert train(recipe, world, training, lambda _: None, validate)
    return recipe, training, [line for line in Log(output / METRICS).read() if line["kind"] == "look"]


def test_categories_of_a_file_are_kept_and_validation_prompts_are_separate(
    tmp_path: Path,
) -> None:
    rows = [{"tag": "colors", "include": [], "prompt": "a red circle"}, {"tag": "counting", "prompt": "two squares"}]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "looks.txt").write_text("a triangle\n")
    recipe = Recipe(heldout=str(tmp_path / "heldout.jsonl"), evaluation=Evaluation(metrics=()))
    world = components.load(recipe)
    assert [(prompt.text, prompt.category) for prompt in world.heldout] == [
        ("a red circle", "colors"),
        ("two squares", "counting"),
    ]
    assert world.validation == ()
    with_file = replace(recipe, guards=Guards(every=1, prompts=str(tmp_path / "looks.txt")))
    assert [prompt.text for prompt in components.load(with_file).validation] == ["a triangle"]
    validation = components.load(replace(recipe, heldout="tiny", guards=Guards(every=1))).validation
    assert len({prompt.category for prompt in validation}) == 6
    assert not {prompt.text for prompt in validation} & {p.text for s in ("train", "heldout") for p in tiny.prompts(s)}


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Any]]:
    return short_run(tmp_path_factory.mktemp("none"))[2]


def held_out_score(look: Mapping[str, Any]) -> float:
    return look["metrics"][HELD]


@pytest.mark.slow
def test_the_hacked_reward_rises_and_the_held_out_scorer_falls(unguarded: list[Mapping[str, Any]]) -> None:
    assert unguarded[-1]["reward"] > unguarded[0]["reward"] + 0.005
    assert held_out_score(unguarded[-1]) < held_out_score(unguarded[0]) - 0.05
    assert unguarded[-1]["rule"] < unguarded[0]["rule"]


@pytest.mark.slow
def test_early_stopping_stops_the_same_run(unguarded: list[Mapping[str, Any]], tmp_path: Path) -> None:
    recipe, training, looks = short_run(tmp_path, patience=2)
    assert training.iteration < recipe.iterations
    assert training.early_stopping.stops(recipe.guards.patience)
    for look, unguarded_look in zip(looks, unguarded):
        assert {**look, "seconds": 0} == {**unguarded_look, "seconds": 0}
    assert training.early_stopping.best == max(looks, key=held_out_score)["iteration"] == looks[-3]["iteration"]


@pytest.mark.slow
def test_the_anchor_reduces_the_fall(unguarded: list[Mapping[str, Any]], tmp_path: Path) -> None:
    _, _, looks = short_run(tmp_path, anchor=3.0)
    fall, unguarded_fall = (
        held_out_score(looks[0]) - held_out_score(looks[-1]),
        held_out_score(unguarded[0]) - held_out_score(unguarded[-1]),
    )
    assert fall < 0.5 * unguarded_fall


@pytest.mark.slow
def test_a_mixture_reduces_the_fall_and_logs_its_parts(unguarded: list[Mapping[str, Any]], tmp_path: Path) -> None:
    recipe, _, looks = short_run(tmp_path, f"1*{HACKED}+2*tiny")
    fall, unguarded_fall = (
        held_out_score(looks[0]) - held_out_score(looks[-1]),
        held_out_score(unguarded[0]) - held_out_score(unguarded[-1]),
    )
    assert fall < 0.75 * unguarded_fall
    for look in looks:
        parts = look["metrics"][f"1*{HACKED}"] + 2 * look["metrics"]["2*tiny"]
        assert look["reward"] == pytest.approx(parts, abs=1e-5)
    assert "tiny" not in components.held_out_scorers(replace(recipe, evaluation=Evaluation()))
