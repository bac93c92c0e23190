"""Recipes: flags, comparison, dicts; a recipe that can't run is refused before anything is loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from trajsurgery import DRaFTLV, DRTune, LeapAlign, RecipeError, ReFL
from trajsurgery.cli import recipe_script, train_command
from trajsurgery.training.checks import preflight
from trajsurgery.training.model import model_folder
from trajsurgery.training.presets import paper, presets
from trajsurgery.training.recipe import FREE, Method, Recipe, differences
from trajsurgery.training.settings import Evaluation, Objective, Optimiser, Rollout, Shard, Trained

ROOT = Path(__file__).parents[2]
TINY = presets(LeapAlign(), "outputs/x")


def parse_recipe(args: list[str], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return the recipe of a command line."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(train_command, "main", lambda recipe, console: recipes.append(recipe) or {})
    assert recipe_script.cli(TINY, "words", args) == 0
    return recipes[0]


def test_without_flags_the_recipe_is_the_tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_recipe([], monkeypatch) == TINY["tiny"]


def test_every_field_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--method.alpha 0.1 --objective.weights-at 0 --rollout.memory staged --optimiser.rate 1e-3 --seed 7"
    recipe = parse_recipe([*flags.split(), "--output", "elsewhere", "--overwrite"], monkeypatch)
    assert recipe.method == LeapAlign(alpha=0.1)
    assert recipe.objective.weights_at == (0,)
    assert (recipe.rollout.memory, recipe.optimiser.rate, recipe.seed) == ("staged", 1e-3, 7)
    assert recipe.output == Path("elsewhere")
    assert recipe.overwrite


def test_the_paper_preset_has_the_paper_s_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(["--preset", "paper", "--model", "some/folder"], monkeypatch)
    assert recipe == replace(TINY["paper"], model="some/folder")
    assert recipe.method == LeapAlign(alpha=0.3)
    assert recipe.objective == Objective(tau=0.1)
    rollout, optimiser = recipe.rollout, recipe.optimiser
    assert (rollout.steps, rollout.size, rollout.guidance, rollout.batch) == (25, 720, 3.5, 64)
    assert (optimiser.rate, optimiser.betas, optimiser.weight_decay) == (1e-5, (0.9, 0.999), 1e-4)
    assert (recipe.ema, recipe.iterations, recipe.evaluation.steps) == (0.995, 300, 50)


def test_help_names_and_explains_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe_script.cli(TINY, "LeapAlign on Flux.", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "LeapAlign on Flux.",
        "--preset {tiny,paper,paper-pickscore,paper-hpsv3,",
        "--method.alpha",
        "The learning rate, constant after the warm-up.",
        "tau",
    ):
        assert words in text
    assert text.count("--") > 35


def test_a_recipe_is_frozen_and_its_dict_is_json() -> None:
    recipe = replace(Recipe(), objective=Objective(weights_at=(0, 3)), method=DRTune(train=3))
    data = json.loads(json.dumps(recipe.to_dict()))
    assert data == recipe.to_dict()
    assert data["method"] == {"name": "DRTune", "train": 3, "last": 11, "connected": False}
    assert differences(data, recipe.to_dict()) == []
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_differences_are_what_changes_the_run() -> None:
    a = Recipe()
    other = replace(
        a, method=ReFL(), seed=3, output=Path("b"), iterations=a.iterations + 1, overwrite=True, save_every=1
    )
    lines = differences(a.to_dict(), replace(other, evaluation=Evaluation(pictures=3)).to_dict())
    assert any(line == "method.name: LeapAlign there, ReFL here" for line in lines)
    assert "seed: 0 there, 3 here" in lines
    assert not any(line.startswith(FREE) for line in lines)


@pytest.mark.parametrize(
    "method, where", [(LeapAlign(), "all"), (DRTune(), "none"), (ReFL(), "none"), (DRaFTLV(), "none")]
)
def test_the_times_of_the_weights_follow_the_method(method: LeapAlign | DRTune | ReFL | DRaFTLV, where: str) -> None:
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


def test_all_numbers_out_of_range_are_reported_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        Recipe(ema=NAN, evaluation=Evaluation(pictures=0, steps=0), optimiser=Optimiser(rate=-1.0))
    assert [line.split(" = ")[0] for line in str(error.value).splitlines()] == [
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
def test_a_method_without_a_legal_plan_is_refused_before_loading(method: Method) -> None:
    with pytest.raises(RecipeError) as error:
        preflight.check_recipe(Recipe(method=method))
    assert repr(method) in str(error.value)
    assert "--preset paper" not in str(error.value)


@pytest.fixture
def without_gpu_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(model_folder, "cached_snapshot", lambda repo: None)


@pytest.mark.usefixtures("without_gpu_and_cache")
def test_everything_missing_is_reported_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        preflight.check_recipe(paper(LeapAlign(), "x"))
    message = str(error.value)
    for words in ("no GPU", "no weights", "hf download black-forest-labs/FLUX.1-dev", "--model FOLDER", "HPS_v2.1"):
        assert words in message
    for words in (
        "no training prompts",
        "no held-out prompts",
        "11.9 G parameters",
        "222 GiB",
        "33.3 GiB",
        "without --preset paper",
    ):
        assert words in message


@pytest.mark.parametrize(
    "gpus, shard, what, fits",
    [(1, "auto", "full", False), (2, "auto", "full", False), (4, "auto", "full", True), (4, "ddp", "full", False),
     (4, "fsdp", "full", True), (1, "auto", "lora", True)],
)  # fmt: skip
def test_the_gpus_of_a_node_share_what_fsdp_shards(
    monkeypatch: pytest.MonkeyPatch, gpus: int, shard: Shard, what: Literal["full", "lora"], fits: bool
) -> None:
    """Four cards of 80 GB hold the 222 GiB that full training of FLUX.1-dev takes, and each copy of DDP needs all."""
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus))
    recipe = replace(paper(LeapAlign(), "x"), shard=shard, train=Trained(what=what))
    with pytest.raises(RecipeError) as error:  # for want of weights and prompts
        preflight.check_recipe(recipe)
    assert ("the GPU has 80 GiB" in str(error.value)) is not fits
    assert ("frozen weights" in str(error.value)) is (what == "lora")


@pytest.mark.parametrize(
    "preset, gib, fits",
    [("paper", 79, False), ("full-80gb", 79, True), ("full-80gb", 40, False), ("lora-80gb", 79, True),
     ("lora-24gb", 23, True)],
)  # fmt: skip
def test_presets_fit_the_cards_that_they_are_for(
    monkeypatch: pytest.MonkeyPatch, preset: str, gib: int, fits: bool
) -> None:
    card = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    with pytest.raises(RecipeError) as error:  # for want of weights and prompts
        preflight.check_recipe(TINY[preset])
    assert (f"the GPU has {gib} GiB" in str(error.value)) is not fits


@pytest.mark.usefixtures("without_gpu_and_cache")
def test_a_complete_recipe_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "p.txt").write_text("a cat\n")
    text = str(tmp_path / "p.txt")
    complete = replace(
        paper(LeapAlign(), "x"), model=str(tmp_path), reward=f"hpsv2.1:{text}", prompts=text, heldout=text
    )
    preflight.check_recipe(complete)
    preflight.check_recipe(replace(complete, reward="tests.builders.toy_world:LikesRed"))
    with pytest.raises(RecipeError, match="no module 'no'"):
        preflight.check_recipe(replace(complete, reward="no.such:Reward"))
    with pytest.raises(RecipeError, match=r"without model_index\.json"):
        preflight.check_recipe(replace(complete, model=str(tmp_path.parent)))


@pytest.mark.parametrize("reward", ["unifiedreward", "unifiedreward:{folder}", "1*tiny+0.5*unifiedreward:{folder}"])
def test_a_judge_is_refused_as_a_training_reward(tmp_path: Path, reward: str) -> None:
    """It is refused with or without its weights on disk; evaluation.metrics takes it."""
    with pytest.raises(RecipeError, match=r"--reward .*unifiedreward.* answers in text and has no gradient.*metrics"):
        preflight.check_recipe(replace(Recipe(), reward=reward.format(folder=tmp_path)))
    preflight.check_recipe(replace(Recipe(), evaluation=Evaluation(metrics=(f"unifiedreward:{tmp_path}",))))


def test_the_tiny_preset_needs_no_files() -> None:
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
