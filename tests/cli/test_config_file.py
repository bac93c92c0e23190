"""`--config FILE`: what a run wrote gives its recipe again, flags change it, and mistakes are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trajsurgery import DRTune, LeapAlign
from trajsurgery.cli.command_line import read_recipe
from trajsurgery.cli.recipe_names import load_presets, shipped_recipes
from trajsurgery.errors import RecipeError
from trajsurgery.runs.results import save_recipe
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Objective, Optimiser

PRESETS = presets(LeapAlign(), "outputs/leapalign_flux")


def read(path: Path, *words: str) -> Recipe:
    """The recipe of a file and of flags after it."""
    return read_recipe(PRESETS, "", ["--config", str(path), *words])


@pytest.mark.parametrize("name", shipped_recipes())
def test_what_a_run_writes_gives_its_recipe_again(name: str, tmp_path: Path) -> None:
    recipes, _ = load_presets(name)
    for preset, recipe in recipes.items():
        if isinstance(recipe, Recipe) and name != "your-own-method":
            written = replace(recipe, output=tmp_path / preset, seed=3, overwrite=True)
            save_recipe(written)
            for file in ("recipe.yaml", "recipe.json"):
                again = read_recipe(recipes, "", ["--config", str(written.output / file)])
                assert again == replace(written, overwrite=file == "recipe.json")


def test_flags_change_the_file_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: drtune\nrollout: {steps: 9, batch: 4}\noptimiser: {rate: 3e-5}\n")
    recipe = read_recipe(PRESETS, "", ["--rollout.batch", "8", "--config", str(path)])
    assert (recipe.rollout.steps, recipe.rollout.batch, recipe.optimiser.rate) == (9, 8, 3e-5)
    assert recipe.method == DRTune()
    assert read(path, "--method", "LeapAlign").method == LeapAlign()


def test_toml_and_special_values(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'reward = "0.7*hpsv2.1+0.3*pickscore"\n[objective]\nweights_at = [0, 3]\n[method]\nname = "DRTune"\ntrain = 3\n'
        "[optimiser]\nbetas = [0.8, 0.99]\nclip = inf\n[rollout]\ncompile_trial = false\n"
        "[train]\nkeep_encoders = true\n"
    )
    recipe = read(path)
    assert recipe.reward == "0.7*hpsv2.1+0.3*pickscore"
    assert recipe.objective == Objective(threshold=0.45, tau=0.02, weights_at=(0, 3))
    assert recipe.method == DRTune(train=3)
    assert recipe.optimiser == Optimiser(betas=(0.8, 0.99), clip=float("inf"))
    assert not recipe.rollout.compile_trial
    assert recipe.train.keep_encoders


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "rollout: {stepz: 3}", r"there is no setting 'rollout\.stepz'\. Did you mean .*rollout\.steps"),
        ("a.yaml", "rollout: [1", "is no YAML"),
        ("a.toml", "a = ", "is no TOML"),
        ("a.json", "[1]", "it is a mapping"),
        ("a.ini", "", r"a file of settings is \.yaml"),
    ],
)
def test_mistakes_are_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read(path)
    with pytest.raises(RecipeError, match="can't be read: No such file"):
        read(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text, words", [("rollout: {steps: many}", "--rollout.steps"), ("ema: 2", "ema = 2.0")])
def test_a_wrong_value_is_told_as_of_a_flag(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        read(path)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
