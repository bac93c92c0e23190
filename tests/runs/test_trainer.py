"""`Trainer` in code: loops that are left and go on, callbacks, a pipeline and a reward given as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.builders import toy_world
from tests.builders.saved_runs import assert_same_run, repeated
from trajsurgery import SRPO, DRaFTLV, LeapAlign, Recipe, RecipeError, Trainer, TrainerCallback, WholeTrajectory
from trajsurgery.runs import contact_sheets
from trajsurgery.runs.gradient_terms import term_norms
from trajsurgery.training.checkpoints.checkpoint import list_checkpoints
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.settings import Evaluation, Guards, Rollout, Trained
from trajsurgery.training.step_record import StepRecord


def trainer_of(recipe: Recipe, *callbacks: TrainerCallback) -> Trainer:
    """A silent trainer of the toy world."""
    quiet = Console(quiet=True)
    return Trainer(recipe, components=toy_world.world(recipe), callbacks=callbacks, console=quiet)


def test_a_loop_over_a_trainer_is_the_whole_run(tmp_path: Path) -> None:
    whole, looped = toy_world.recipe(tmp_path / "whole"), toy_world.recipe(tmp_path / "looped")
    evaluation = trainer_of(whole).train()
    trainer = trainer_of(looped)
    records = list(trainer)
    assert [record.iteration for record in records] == [1, 2, 3, 4, 5, 6]
    assert_same_run(whole.output, looped.output)
    assert evaluation is not None
    assert trainer.evaluation is not None
    assert repeated([evaluation]) == repeated([trainer.evaluation])
    assert {"recipe.json", "run.json", "samples.png", "reward.png"} <= {path.name for path in looped.output.iterdir()}


@pytest.mark.parametrize("way", ["break", "error", "should_stop"])
def test_a_loop_that_is_left_goes_on_bit_for_bit(tmp_path: Path, way: str) -> None:
    whole, left = toy_world.recipe(tmp_path / "whole"), toy_world.recipe(tmp_path / "left", save_every=4)
    trainer_of(whole).train()
    trainer = trainer_of(left)
    try:
        for record in trainer:
            if record.iteration == 3 and way == "error":
                raise ZeroDivisionError
            if record.iteration == 3 and way == "break":
                break
            trainer.should_stop = way == "should_stop" and record.iteration == 3
    except ZeroDivisionError:
        assert way == "error"
    del trainer  # an error's traceback keeps the loop, and it is closed with it
    assert int(list_checkpoints(left.output)[0].name) == 3
    records = list(trainer_of(left))
    assert [record.iteration for record in records] == [4, 5, 6]
    assert_same_run(whole.output, left.output)


class Noted(TrainerCallback):
    """Notes the events in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.events.append(("begin", trainer.state.iteration))

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.events.append(("step", record.iteration))

    def on_evaluate(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        self.events.append((record["kind"], trainer.state.iteration))

    def on_sheet(self, trainer: Trainer, iteration: int, prompts: Sequence[str], images: Tensor) -> None:
        self.events.append(("sheet", iteration, len(prompts), tuple(images.shape)))

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        assert (folder / "about.json").exists()
        self.events.append(("save", int(folder.name)))

    def on_train_end(self, trainer: Trainer, evaluation: Mapping[str, Any] | None) -> None:
        self.events.append(("end", evaluation is not None))

    def on_exit(self, trainer: Trainer) -> None:
        self.events.append("exit")


def test_callbacks_are_called_in_order(tmp_path: Path) -> None:
    evaluation = Evaluation(images=10, steps=5, batch=4, pictures=4, sheet_every=2, sheet_images=3)
    recipe = toy_world.recipe(tmp_path, iterations=3, save_every=2, evaluation=evaluation)
    noted = Noted()
    trainer_of(recipe, noted).train()
    sheet = (3, (3, 3, 16, 16))
    assert noted.events == [
        ("save", 0), ("begin", 0), ("sheet", 0, *sheet), ("step", 1),
        ("save", 2), ("step", 2), ("sheet", 2, *sheet), ("step", 3), ("sheet", 3, *sheet), ("save", 3),
        ("evaluation", 3), ("end", True), "exit",
    ]  # fmt: skip
    again = Noted()
    trainer_of(recipe, again).train()
    assert again.events == [("end", True), "exit"]


def test_validation_rounds_reach_callbacks(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=2, guards=Guards(every=1, images=4))
    noted, world = Noted(), toy_world.world(recipe)
    parts = {"metrics": {"held": toy_world.LikesRed()}, "validation": toy_world.PROMPTS}
    Trainer(recipe, components=type(world)(**{**vars(world), **parts}), callbacks=[noted]).train()
    assert [event[1] for event in noted.events if event[0] == "look"] == [0, 1, 2]


def test_contact_sheets_change_nothing_else(tmp_path: Path) -> None:
    plain, sheets = (
        toy_world.recipe(tmp_path / str(every), evaluation=Evaluation(10, 5, 4, 4, sheet_every=every))
        for every in (None, 2)
    )
    for recipe in (plain, sheets):
        trainer_of(recipe).train()
    assert_same_run(plain.output, sheets.output)
    assert not (plain.output / "sheets").exists()
    assert sorted(path.name for path in (sheets.output / "sheets").iterdir()) == [
        "000000",
        "000002",
        "000004",
        "000006",
    ]


def test_the_last_event_also_follows_an_error(tmp_path: Path) -> None:
    class Failing(Noted):
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            raise RuntimeError("a tracker without network")

    failing = Failing()
    with pytest.raises(RuntimeError, match="a tracker"):
        trainer_of(toy_world.recipe(tmp_path), failing).train()
    assert failing.events[-1] == "exit"
    assert int(list_checkpoints(tmp_path)[0].name) == 1  # saved as the loop was left


def test_objects_take_the_place_of_names(tmp_path: Path) -> None:
    recipe = Recipe(
        rollout=Rollout(steps=4, batch=2, size=16),
        evaluation=Evaluation(images=4, steps=4, batch=4, pictures=4),
        iterations=2,
        device="cpu",
        output=str(tmp_path),  # pyright: ignore[reportArgumentType]  # a text will do
    )
    seen = set[str]()

    def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.update(prompts)
        return images[:, 0].mean((-1, -2))

    red.threshold = 1.0  # pyright: ignore[reportFunctionMemberAccess]
    pipe, prompts, heldout = toy_world.pipeline(), ["a red circle", "a circle"], ["two squares", "a blue square"]
    before = pipe.transformer.proj_out.weight.detach().clone()
    objects: dict[str, Any] = {"pipe": pipe, "reward": red, "prompts": prompts, "heldout": heldout}
    trainer = Trainer(recipe, **objects, console=Console(quiet=True))
    evaluation = trainer.train()
    assert evaluation is not None
    assert trainer.components.pipe is pipe
    assert not torch.equal(pipe.transformer.proj_out.weight, before)
    assert seen == {*prompts, *heldout}
    saved = json.loads((tmp_path / "recipe.json").read_text())
    assert saved["reward"].endswith("red")
    assert saved["prompts"] == saved["heldout"] == "given in code"
    assert len(Log(tmp_path / METRICS).read()) == 3


@pytest.mark.parametrize(
    "objects, message",
    [
        ({"prompts": ["a circle"]}, "prompts= needs heldout="),
        ({"prompts": "train.txt", "heldout": ["a circle"]}, r"prompts= is a list of texts.*Recipe\(prompts=FILE\)"),
        ({"heldout": []}, "heldout= is a list of texts"),
    ],
)
def test_unusable_objects_are_refused_at_once(tmp_path: Path, objects: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Trainer(toy_world.recipe(tmp_path), **objects)


def test_names_that_are_not_given_are_still_checked(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, reward="hpsv21", model="flux")
    with pytest.raises(RecipeError, match=r"hpsv2\.1") as error:
        Trainer(recipe, pipe=toy_world.pipeline()).train()
    assert "no model" not in str(error.value)


def test_a_trainer_runs_once(tmp_path: Path) -> None:
    trainer = trainer_of(toy_world.recipe(tmp_path, iterations=1))
    trainer.train()
    with pytest.raises(RecipeError, match="has run"):
        trainer.train()


def test_the_norms_of_the_gradient_s_terms_follow_alpha(tmp_path: Path) -> None:
    """Alpha scales the nested term alone (Eq. 10)."""
    norms = list[dict[str, float]]()
    for alpha in (0.0, 0.3, 0.6):
        recipe = toy_world.recipe(tmp_path, LeapAlign(alpha=alpha))
        terms = term_norms(recipe, toy_world.world(recipe), 3)
        assert terms is not None
        norms.append(terms)
    assert "nested once" not in norms[0] or norms[0]["nested once"] == 0
    assert norms[1]["nested once"] > 0
    assert norms[2]["nested once"] == pytest.approx(2 * norms[1]["nested once"], rel=1e-4)
    assert {round(each["single-step"] / norms[0]["single-step"], 5) for each in norms} == {1.0}


@pytest.mark.parametrize("method", [WholeTrajectory(), SRPO(), DRaFTLV()], ids=lambda m: type(m).__name__)
def test_terms_that_are_many_or_drawn_are_not_measured(method: Any, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, method)
    assert term_norms(recipe, toy_world.world(recipe), 1) is None


def test_scores_that_are_not_finite_have_no_terms_and_stop_nothing(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = replace(toy_world.world(recipe), reward=lambda images, _: images.mean((1, 2, 3)) * float("nan"))
    assert term_norms(recipe, world, 1) is None


def test_a_sheet_goes_without_terms_where_memory_does_not_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(contact_sheets, "term_norms", full)
    recipe = toy_world.recipe(tmp_path, iterations=1)
    assert trainer_of(recipe).train() is not None
    assert json.loads((tmp_path / "sheets/000001/sheet.json").read_text())["terms"] is None


def test_a_pipeline_given_again_goes_on_with_its_adapters(tmp_path: Path) -> None:
    """The first trainer leaves its adapters in the caller's pipeline; the second reads them from the checkpoint."""
    recipe = toy_world.recipe(tmp_path, train=Trained("lora", rank=2), iterations=3)
    pipe = toy_world.pipeline()
    objects: dict[str, Any] = {
        "pipe": pipe,
        "reward": toy_world.LikesRed(),
        "heldout": ["a circle"],
        "prompts": ["a square"],
    }
    for record in Trainer(recipe, **objects, console=Console(quiet=True)):
        if record.iteration == 1:
            break
    second = Trainer(recipe, **objects, console=Console(quiet=True))
    assert [record.iteration for record in second] == [2, 3]
    assert list(pipe.transformer.peft_config) == ["default"]
