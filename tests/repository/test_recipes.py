"""Every recipe is a few lines, and runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.builders import toy_world
from trajsurgery.cli.recipe_script import cli
from trajsurgery.cli.train_command import main
from trajsurgery.training.recipe import Method

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.stem != "reno_flux")
"""The training recipes; `reno_flux` is tested in tests/training/test_noise_search.py."""
MODELS = {"flux": "black-forest-labs/FLUX.1-dev", "sd3": "stabilityai/stable-diffusion-3.5-medium"}


def load_recipe(path: Path) -> Any:
    """Import a recipe's file without running it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def test_every_method_has_a_recipe() -> None:
    """Every training method has a recipe, and every recipe a row in the tables."""
    drawn = {type(load_recipe(path).RECIPES["tiny"].method) for path in FILES}
    assert drawn >= set(get_args(Method))
    tables = "".join((ROOT / readme).read_text() for readme in ("README.md", "recipes/README.md"))
    for path in (ROOT / "recipes").glob("*.py"):
        row = f"](recipes/{path.name}) |" if path.stem.endswith("_flux") else f"`{path.name}`"
        assert row in tables, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_a_few_lines_and_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) < 30
    recipes = load_recipe(path).RECIPES
    assert recipes["tiny"].output == Path("outputs") / path.stem
    assert "paper" in recipes or path.stem.endswith("_wan"), "the paper has no videos"
    for large in (recipes[name] for name in recipes if name == "paper"):
        assert large.model == MODELS.get(path.stem.rpartition("_")[2], MODELS["flux"])
        assert large.objective.tau == (0.2 if path.stem == "flowbp_lagrange_flux" else 0.1), "the authors' tau"
        assert large.method == recipes["tiny"].method or path.stem == "srpo_flux", "SRPO's words depend on the model"
    short = toy_world.recipe(tmp_path)
    settings = {"rollout": replace(short.rollout, steps=12), "evaluation": short.evaluation, "threads": 1}
    recipe = replace(recipes["tiny"], iterations=2, output=tmp_path, **settings)
    assert main(recipe, toy_world.world(recipe)) is not None


def test_a_recipe_takes_a_model_folder_a_prompt_file_and_a_reward_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_world.pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.csv").write_text("prompt\na red circle\n two squares \na red circle\n")
    flags = {
        "model": tmp_path / "model",
        "reward": "tests.builders.toy_world:LikesRed",
        "prompts": tmp_path / "prompts.csv",
        "heldout": tmp_path / "prompts.csv",
        "output": tmp_path / "run",
        "rollout.size": 16,
        "rollout.steps": 4,
        "rollout.batch": 3,
        "evaluation.images": 6,
        "evaluation.steps": 4,
        "iterations": 2,
        "threads": 1,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert cli(load_recipe(ROOT / "recipes/refl_flux.py").RECIPES, "words", words) == 0
    assert capsys.readouterr().out.count("prompts.csv: 1 of 3 prompts repeat others") == 1
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["images"] == 6
    assert list(line["categories"]) == ["all"]
    assert "rule_before" not in line


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_the_tiny_model(path: Path, tmp_path: Path) -> None:
    flags = ["--iterations", "2", "--rollout.batch", "4", "--evaluation.images", "12", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(path), *flags], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "outputs" / path.stem / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    evaluation = json.loads(lines[-1])
    assert evaluation["images"] == 12
    assert len(evaluation["categories"]) == (4 if path.stem.endswith("_wan") else 6)
    assert "rule-based score" in done.stdout
