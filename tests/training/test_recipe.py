"""A recipe is a value: read from flags, compared, written down; what can't run says so before anything is loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from trajsurgery import DRaFTLV, DRTune, LeapAlign, RecipeError, ReFL
from trajsurgery.cli import train_command
from trajsurgery.training import model_folder, preflight
from trajsurgery.training.objective import Objective
from trajsurgery.training.recipe import FREE, Method, Recipe, differences, paper, presets
from trajsurgery.training.settings import Evaluation, Optimiser, Rollout

ROOT = Path(__file__).parents[2]
TINY = presets(LeapAlign(), "outputs/x")


def read(args: list[str], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe that a command line stands for."""
    seen: list[Recipe] = []
    monkeypatch.setattr(train_command, "main", lambda recipe, console: seen.append(recipe) or {})
    assert train_command.cli(TINY, "words", args) == 0
    return seen[0]


def test_no_argument_is_the_embedded_world(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read([], monkeypatch) == TINY["tiny"]


def test_every_field_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--method.alpha 0.1 --objective.weights-at 0 --rollout.memory staged --optimiser.rate 1e-3 --seed 7"
    found = read([*flags.split(), "--output", "elsewhere", "--overwrite"], monkeypatch)
    assert found.method == LeapAlign(alpha=0.1)
    assert found.objective.weights_at == (0,)
    assert (found.rollout.memory, found.optimiser.rate, found.seed) == ("staged", 1e-3, 7)
    assert found.output == Path("elsewhere")
    assert found.overwrite


def test_the_papers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(["--preset", "paper", "--model", "some/folder"], monkeypatch)
    assert found == replace(TINY["paper"], model="some/folder")
    assert found.method == LeapAlign(alpha=0.3)
    assert found.objective == Objective(threshold=0.55, tau=0.1)
    assert (found.rollout.steps, found.rollout.size, found.rollout.guidance, found.rollout.batch) == (25, 720, 3.5, 64)
    optimiser = found.optimiser
    assert (optimiser.rate, optimiser.betas, optimiser.weight_decay) == (1e-5, (0.9, 0.999), 1e-4)
    assert (found.ema, found.iterations, found.evaluation.steps) == (0.995, 300, 50)


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_command.cli(TINY, "LeapAlign on Flux.", ["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for words in (
        "LeapAlign on Flux.",
        "--preset {tiny,paper}",
        "--method.alpha",
        "The learning rate, constant.",
        "tau",
    ):
        assert words in said
    assert said.count("--") > 35


def test_a_recipe_is_a_plain_dict_and_frozen() -> None:
    found = replace(Recipe(), objective=Objective(weights_at=(0, 3)), method=DRTune(train=3))
    data = json.loads(json.dumps(found.to_dict()))
    assert data == found.to_dict()
    assert data["method"] == {"name": "DRTune", "train": 3, "last": 11, "connected": False}
    assert differences(data, found.to_dict()) == []
    with pytest.raises(FrozenInstanceError):
        found.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_recipes_differ_by_what_changes_the_run() -> None:
    a = Recipe()
    other = replace(
        a, method=ReFL(), seed=3, output=Path("b"), iterations=a.iterations + 1, overwrite=True, save_every=1
    )
    found = differences(a.to_dict(), replace(other, evaluation=Evaluation(pictures=3)).to_dict())
    assert any(line == "method.name: LeapAlign there, ReFL here" for line in found)
    assert "seed: 0 there, 3 here" in found
    assert not any(line.startswith(FREE) for line in found)


@pytest.mark.parametrize(
    "method, where", [(LeapAlign(), "all"), (DRTune(), "none"), (ReFL(), "none"), (DRaFTLV(), "none")]
)
def test_weights_follow_the_method(method: LeapAlign | DRTune | ReFL | DRaFTLV, where: str) -> None:
    assert Recipe(method=method).weights_at == where
    assert Recipe(method=method, objective=Objective(weights_at="j")).weights_at == "j"


@pytest.mark.parametrize(
    "wrong",
    [{"iterations": 0}, {"ema": 1.0}, {"threads": 0}, {"save_every": 0}, {"rollout": Rollout(batch=0)}],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        replace(Recipe(), **wrong)


NAN = float("nan")


@pytest.mark.parametrize(
    "part, wrong",
    [
        ("rollout", Rollout(steps=0)),
        ("rollout", Rollout(at_once=0)),
        ("rollout", Rollout(at_once=-1)),
        ("rollout", Rollout(size=0)),
        ("rollout", Rollout(guidance=NAN)),
        ("evaluation", Evaluation(steps=0)),
        ("evaluation", Evaluation(pictures=0)),
        ("evaluation", Evaluation(pictures=-1)),
        ("optimiser", Optimiser(rate=NAN)),
        ("optimiser", Optimiser(rate=math.inf)),
        ("optimiser", Optimiser(betas=(0.9, 1.0))),
        ("optimiser", Optimiser(weight_decay=-1e-4)),
        ("optimiser", Optimiser(clip=NAN)),
    ],
)
def test_numbers_of_a_part_out_of_range_are_refused(part: str, wrong: object) -> None:
    name = next(n for n, value in vars(wrong).items() if value != getattr(type(wrong)(), n))
    with pytest.raises(RecipeError, match=rf"^{part}\.{name}\b"):
        replace(Recipe(), **{part: wrong})


def test_all_numbers_out_of_range_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as found:
        Recipe(ema=NAN, evaluation=Evaluation(pictures=0, steps=0), optimiser=Optimiser(rate=-1.0))
    assert [line.split(" = ")[0] for line in str(found.value).splitlines()] == [
        "evaluation.steps",
        "evaluation.pictures",
        "ema",
        "optimiser.rate",
    ]


@pytest.mark.parametrize(
    "method",
    [LeapAlign(alpha=2), LeapAlign(leaps=0), LeapAlign(window=(0, 2)), DRTune(train=0), ReFL(last=0), DRaFTLV(n=-1)],
    ids=repr,
)
def test_a_method_that_allows_no_plan_is_told_before_anything_is_loaded(method: Method) -> None:
    with pytest.raises(RecipeError) as found:
        preflight.check_recipe(Recipe(method=method))
    assert repr(method) in str(found.value)
    assert "--preset paper" not in str(found.value)


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(model_folder, "cached_snapshot", lambda repo: None)


@pytest.mark.usefixtures("nothing_here")
def test_what_is_missing_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as found:
        preflight.check_recipe(paper(LeapAlign(), "x"))
    said = str(found.value)
    for words in ("no GPU", "no weights", "hf download black-forest-labs/FLUX.1-dev", "--model FOLDER", "HPS_v2.1"):
        assert words in said
    for words in (
        "no training prompts",
        "no held-out prompts",
        "11.9 G parameters",
        "222 GiB",
        "33.3 GiB",
        "without --preset paper",
    ):
        assert words in said


@pytest.mark.usefixtures("nothing_here")
def test_what_is_there_is_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "p.txt").write_text("a cat\n")
    text = str(tmp_path / "p.txt")
    here = replace(paper(LeapAlign(), "x"), model=str(tmp_path), reward=f"hpsv2.1:{text}", prompts=text, heldout=text)
    preflight.check_recipe(here)
    preflight.check_recipe(replace(here, reward="tests.builders.toy_world:LikesRed"))
    with pytest.raises(RecipeError, match="MODULE:NAME"):
        preflight.check_recipe(replace(here, reward="no.such:Reward"))
    with pytest.raises(RecipeError, match=r"without model_index\.json"):
        preflight.check_recipe(replace(here, model=str(tmp_path.parent)))


@pytest.mark.parametrize("asked", ["unifiedreward", "unifiedreward:{here}", "1*tiny+0.5*unifiedreward:{here}"])
def test_a_judge_is_no_reward_of_a_recipe(tmp_path: Path, asked: str) -> None:
    """It is told beside all else that is missing, weights or not; evaluation.metrics takes it."""
    with pytest.raises(RecipeError, match=r"--reward .*unifiedreward.* answers in text and has no gradient.*metrics"):
        preflight.check_recipe(replace(Recipe(), reward=asked.format(here=tmp_path)))
    preflight.check_recipe(replace(Recipe(), evaluation=Evaluation(metrics=(f"unifiedreward:{tmp_path}",))))


def test_the_embedded_world_needs_nothing() -> None:
    preflight.check_recipe(Recipe())


@pytest.mark.slow
def test_the_paper_preset_stops_without_a_traceback(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "recipes/leapalign_flux.py"), "--preset", "paper", "--model", "nobody/nothing"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "RecipeError" in done.stdout
    assert "neither a local folder nor in the Hugging Face cache" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
