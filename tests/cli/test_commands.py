"""`trajsurgery train`, `plan-memory`, `explain`, `prove` and `doctor`, as a user calls them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.builders.small_pipelines import PIPELINES
from trajsurgery import LeapAlign, Plan, cli, latent
from trajsurgery.cli import doctor, fit_command, train_command
from trajsurgery.cli.method_commands import timeline
from trajsurgery.cli.recipe_names import load_presets, shipped_recipes
from trajsurgery.errors import RecipeError
from trajsurgery.training.recipe import Recipe

ROOT = Path(__file__).parents[2]

METHODS = """
from trajsurgery import Plan, latent

def right(steps, generator=None):
    return Plan(latent(2).leap(0).connect(), steps=steps)

class Wrong:
    def draw(self, steps, generator=None):
        return latent(2)
"""


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_recipe_is_known_by_its_name(name: str) -> None:
    presets, description = load_presets(name)
    assert "tiny" in presets
    assert description.split()[0] in (ROOT / "recipes" / f"{name.replace('-', '_')}.py").read_text()
    assert load_presets(name.replace("-", "_"))[0] == presets


def test_train_runs_a_recipe_by_name_and_a_file_with_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = list[Recipe]()
    monkeypatch.setattr(train_command, "main", lambda recipe, console: runs.append(recipe) or {})
    for recipe in ("leapalign-flux", str(ROOT / "recipes/leapalign_flux.py")):
        words = ["train", recipe, "--preset", "lora-80gb", "--rollout.batch", "6"]
        assert cli.main(words) == 0
    assert runs[0] == runs[1]
    assert (runs[0].preset, runs[0].rollout.batch, runs[0].method) == ("lora-80gb", 6, LeapAlign(alpha=0.3))


def test_plan_memory_writes_what_the_dry_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PIPELINES["flux"]().pipe.save_pretrained("model")
    words = "leapalign-flux --model model --rollout.size 32 --output run"
    assert cli.main(["plan-memory", *words.split()]) == 0
    assert json.loads(Path("run/memory.json").read_text())["peak"] > 0
    before = load_presets("leapalign-flux")[0]["tiny"]
    after = replace(before, rollout=replace(before.rollout, at_once=1))
    command = ("trajsurgery", "plan-memory", "leapalign-flux", "--fit", "24GB", "--output", "run", "--dry-run")
    expected = "trajsurgery train leapalign-flux --output run --rollout.at-once 1"
    assert fit_command._command(before, after, command) == expected


@pytest.mark.parametrize(
    "words, message",
    [
        ("train leapalign-flx", r"no recipe 'leapalign-flx'. Did you mean 'leapalign-flux'\?"),
        ("train gone.py", "there is no file"),
        ("train empty.py", "has no 'RECIPES'"),
        ("train wrong.py", "RECIPES is not a dict of recipes"),
        ("plan-memory reno-flux", "reno-flux optimises noise"),
        ("explain leapaling", r"Did you mean 'LeapAlign'\?"),
        ("doctor --device cuda:77", "cuda:77"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("")
    Path("wrong.py").write_text("RECIPES = {'tiny': 3}")
    assert cli.main(words.split()) == 1
    assert message.replace("\\", "") in capsys.readouterr().out


def test_explain_shows_the_drawn_plan_its_gradient_and_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    assert cli.main(["explain", "leapalign", "--steps", "12", "--seed", "3", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    plan = LeapAlign().draw(12, torch.Generator().manual_seed(3))
    for text in (str(plan), str(plan.gradient()), str(plan.cost(12)), timeline(plan, 12)):
        assert text in printed
    assert "<svg" in picture.read_text()


def test_the_timeline_marks_the_calls_with_gradient() -> None:
    plan = Plan(latent(5).leap(2).connect().leap(0).connect(), steps=6)
    assert timeline(plan, 6).startswith("t = 6 ·●··●· 1 ")


def test_prove_proves_a_users_method_and_says_what_is_wrong_with_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(METHODS)
    assert cli.main(["prove", "mine.py:right", "--draws", "1"]) == 0
    printed = capsys.readouterr().out
    assert "proved, on 2 runs of 1 plans" in printed
    assert "differences" in printed
    assert cli.main(["prove", "mine.py:Wrong", "--draws", "1"]) == 1
    assert "PlanError: Wrong.draw returned a Latent: a method's draw returns Plan(" in capsys.readouterr().out


def test_prove_ends_in_1_if_a_check_misses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from trajsurgery.testing import gradient_proof

    monkeypatch.setitem(gradient_proof.TOLERANCES, torch.float64, -1.0)
    assert cli.main(["prove", "refl", "--draws", "1"]) == 1
    assert "not proved: " in capsys.readouterr().out


def test_doctor_finds_what_is_here_and_the_command_for_what_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert f"ok       {torch.__version__.partition('+')[0]}" in lines["torch"]
    assert "--attention _native_math " in printed
    assert "output and gradient are finite on cpu" in printed
    assert "hf download black-forest-labs/FLUX.1-dev" in printed
    assert "hpsv2.1:FILE" in printed
    found = doctor.version

    def without(name: str) -> str:
        if name in ("tyro", "bitsandbytes"):
            raise doctor.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(doctor, "version", without)
    findings = {finding.what: finding for finding in doctor.packages()}
    assert findings["tyro"] == ("tyro", "broken", "pip install 'tyro'")
    assert findings["bitsandbytes"] == ("bitsandbytes", "missing", "pip install 'trajsurgery[gpu]'")
    assert "pytest" not in findings


def test_a_recipe_that_is_missing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="It is alignprop-flux, "):
        load_presets("flux")
