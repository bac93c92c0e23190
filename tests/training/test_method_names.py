"""`--method NAME`: the package's methods and users' own, from the command line to a trained run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import toy_world
from trajsurgery import DRaFTLV, DRTune, LeapAlign, Plan, RecipeError, latent
from trajsurgery.cli import recipe_script, train_command
from trajsurgery.training.checks import preflight
from trajsurgery.training.method_names import METHODS, load_method
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Recipe, differences

RECIPES = presets(LeapAlign(), "outputs/x")

SOURCE = """from __future__ import annotations
from dataclasses import dataclass
from trajsurgery import Plan, latent

@dataclass(frozen=True)
class OneLeap:
    time: int = 2

    def draw(self, steps, generator=None):
        return Plan(latent(self.time).leap(0).connect(), steps=steps)

class Plain:
    weights_at = "all"
    def draw(self, steps, generator=None):
        return Plan(latent(2).leap(0).connect(), steps=steps)

instance = OneLeap(3)

def one_leap(steps, generator=None):
    return Plan(latent(2).leap(0).connect(), steps=steps)

def faulty(steps, generator=None):
    return 1 / 0

def no_plan(steps, generator=None):
    return latent(2).leap(0)

number = 3
"""


@pytest.fixture
def own_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the working folder, which is not on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_methods.py").write_text(SOURCE)
    yield "own_methods"
    for name in [n for n in sys.modules if n == "own_methods" or n.startswith(str(tmp_path))]:
        del sys.modules[name]


def parse(words: str, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return the recipe of a command line."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(train_command, "main", lambda recipe, console: recipes.append(recipe) or {})
    assert recipe_script.cli(RECIPES, "words", words.split()) == 0
    return recipes[0]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_name(name: str) -> None:
    assert load_method(name) == METHODS[name]()
    assert load_method(name.lower()) == METHODS[name]()


def test_a_method_is_a_flag_and_has_its_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--method drtune --method.train 3 --seed 4", monkeypatch).method == DRTune(train=3)
    recipe = parse("--seed 4 --method=draft_lv --preset paper", monkeypatch)
    assert (recipe.method, recipe.seed, recipe.preset) == (DRaFTLV(), 4, "paper")
    assert parse("--method.alpha 0.5", monkeypatch).method == LeapAlign(alpha=0.5)


@pytest.mark.parametrize("place", ["own_methods", "own_methods.py"])
@pytest.mark.parametrize("name", ["OneLeap", "Plain", "instance", "one_leap"])
def test_a_class_an_instance_and_a_function_will_do(
    own_methods: str, place: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse(f"--method {place}:{name} --rollout.steps 5", monkeypatch)
    plan: Any = recipe.method.draw(5, torch.Generator())
    assert plan == Plan(latent(3 if name == "instance" else 2).leap(0).connect(), steps=5)
    assert recipe.weights_at == ("all" if name == "Plain" else "none")
    assert type(recipe.method).__name__ == ("OneLeap" if name == "instance" else name)
    saved = json.loads(json.dumps(recipe.to_dict()))
    assert differences(saved, recipe.to_dict()) == []
    assert differences(saved, replace(recipe, method=LeapAlign()).to_dict())


def test_a_method_of_the_user_s_own_has_flags(own_methods: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse(f"--method {own_methods}:OneLeap --method.time 4", monkeypatch)
    assert recipe.method.draw(5).outputs == Plan(latent(4).leap(0).connect(), steps=5).outputs


def test_a_run_with_a_function_trains_and_is_resumed(own_methods: str, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path / "run", load_method(f"{own_methods}:one_leap"), iterations=2)
    assert train_command.main(recipe, toy_world.world(recipe)) is not None
    longer = replace(recipe, iterations=3, method=load_method(f"{own_methods}:one_leap"))
    evaluation = train_command.main(longer, toy_world.world(longer))
    assert evaluation is not None
    assert evaluation["iterations"] == 3


@pytest.mark.parametrize(
    "words, message",
    [
        ("--method draft_vl", r"no method 'draft_vl'\. Did you mean 'DRaFTLV'\?.*MODULE:NAME"),
        ("--method own_methods:OneLaep", r"has no 'OneLaep'\. Did you mean 'OneLeap'\?"),
        ("--method own_methods:number", r"is int: a method is a function draw"),
        ("--method nowhere:OneLeap", r"no module 'nowhere'"),
        ("--preset papr", r"no preset .papr.\. Did you mean 'paper'\?"),
    ],
)
def test_a_wrong_name_is_told(own_methods: str, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe_script.cli(RECIPES, "words", words.split()) == 1
    assert re.search(message, capsys.readouterr().out)


@pytest.mark.parametrize(
    "name, message",
    [
        ("faulty", r"raised ZeroDivisionError: division by zero \(.*own_methods\.py, line 23\)"),
        ("no_plan", r"draw returned \w+; it returns a trajsurgery\.Plan"),
    ],
)
def test_a_method_that_draws_no_plan_is_told_before_the_run(own_methods: str, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        preflight.check_recipe(replace(Recipe(), method=load_method(f"{own_methods}:{name}")))
