"""A run that was killed and resumed equals an uninterrupted run bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import toy_world
from tests.builders.saved_runs import assert_same_run
from trajsurgery import DRaFTLV, DRTune, LeapAlign, RecipeError, ReFL
from trajsurgery.cli.train_command import main
from trajsurgery.evaluation.held_out import evaluate
from trajsurgery.training.checkpoints.checkpoint import discard, list_checkpoints, resume, save
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.settings import Optimiser, Trained
from trajsurgery.training.training_loop import train


class Killed(BaseException):
    """Stands in for SIGKILL inside one process."""


def killed_at(
    recipe: Recipe,
    number: int,
    validating: Callable[[Any, TrainingState], Callable[[], bool]] = lambda *_: lambda: True,
) -> None:
    """Train up to an iteration, stop in the next one without saving, and leave a torn line at the end of the log."""
    world = toy_world.world(recipe)
    training = TrainingState.start(recipe, world.module)

    def draw(count: int, generator: torch.Generator) -> list[str]:
        if training.iteration == number:
            raise Killed
        return toy_world.draw(count, generator)

    world = replace(world, draw=draw)
    resume(recipe, training)
    training.before = training.before or evaluate(recipe, world).to_dict()
    save(recipe, training)
    with pytest.raises(Killed):
        train(recipe, world, training, lambda _: None, validating(world, training))
    with (recipe.output / METRICS).open("a") as log:
        log.write('{"kind": "iteration", "itera')


@pytest.mark.parametrize(
    "method", [LeapAlign(), DRTune(last=3), ReFL(last=3), DRaFTLV()], ids=lambda m: type(m).__name__
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, method: Method) -> None:
    whole, interrupted = toy_world.recipe(tmp_path / "whole", method), toy_world.recipe(tmp_path / "torn", method)
    main(whole, toy_world.world(whole))
    killed_at(interrupted, 3)
    killed_at(interrupted, 5)
    main(interrupted, toy_world.world(interrupted))
    assert_same_run(whole.output, interrupted.output)


def test_another_recipe_is_refused_with_the_differences(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=2)
    main(recipe, toy_world.world(recipe))
    other = replace(recipe, method=DRTune(), optimiser=Optimiser(rate=0.5), seed=1)
    with pytest.raises(RecipeError) as error:
        main(other, toy_world.world(other))
    message = str(error.value)
    for words in ("method.name: LeapAlign there, DRTune here", "optimiser.rate: 0.01 there, 0.5 here", "seed: 0 there"):
        assert words in message
    assert "--overwrite" in message
    assert "--output" in message
    assert main(replace(other, overwrite=True), toy_world.world(other)) is not None


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=2)
    first = main(recipe, toy_world.world(recipe))
    log = (tmp_path / METRICS).read_text()
    monkeypatch.setattr("trajsurgery.runs.trainer.iterate", lambda *_: pytest.fail("it trained again"))
    assert main(recipe, toy_world.world(recipe)) == json.loads(json.dumps(first))
    assert (tmp_path / METRICS).read_text() == log
    monkeypatch.undo()
    assert main(replace(recipe, overwrite=True), toy_world.world(recipe)) is not None
    assert len(Log(tmp_path / METRICS).read()) == 3


def test_a_finished_run_continues_to_more_iterations(tmp_path: Path) -> None:
    whole = toy_world.recipe(tmp_path / "whole", iterations=5)
    extended = toy_world.recipe(tmp_path / "part", iterations=3)
    main(whole, toy_world.world(whole))
    main(extended, toy_world.world(extended))
    main(replace(extended, iterations=5), toy_world.world(extended))
    assert_same_run(whole.output, extended.output)
    with pytest.raises(RecipeError, match="holds 5 iterations of this recipe, more than the 3"):
        main(extended, toy_world.world(extended))


def damage_file(folder: Path, name: str) -> None:
    """Change one byte of a file, whose length stays."""
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def delete_file(folder: Path, name: str) -> None:
    (folder / name).unlink()


DAMAGES = [
    (damage_file, "state.pt", "not as written"),
    (delete_file, "state.pt", "not as written"),
    (damage_file, "about.json", "not as written"),
    (damage_file, "SHA256SUMS", "ValueError"),
    (delete_file, "SHA256SUMS", "FileNotFoundError"),
]


def interrupted_run(output: Path, **changes: Any) -> Recipe:
    """A run of 6 iterations, killed after the fifth: checkpoints 2 and 4 are there."""
    recipe = toy_world.recipe(output, save_every=2, **changes)
    killed_at(recipe, 5)
    assert [folder.name for folder in list_checkpoints(output)] == ["000004", "000002"]
    return recipe


@pytest.mark.parametrize("harm, name, reason", DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, harm: Callable[[Path, str], None], name: str, reason: str
) -> None:
    recipe, lines = interrupted_run(tmp_path), list[str]()
    newest = list_checkpoints(tmp_path)[0]
    harm(newest, name)
    training = TrainingState.start(recipe, toy_world.world(recipe).module)
    assert resume(recipe, training, lines.append)
    assert training.iteration == 2
    (line,) = lines
    assert f"{newest} is damaged" in line
    assert reason in line
    assert "from iteration 2" in line
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["000002"]


def test_a_run_with_a_damaged_checkpoint_ends_like_one_without(tmp_path: Path) -> None:
    whole = toy_world.recipe(tmp_path / "whole", save_every=2)
    main(whole, toy_world.world(whole))
    recipe = interrupted_run(tmp_path / "torn")
    damage_file(list_checkpoints(recipe.output)[0], "state.pt")
    main(recipe, toy_world.world(recipe))
    assert_same_run(whole.output, recipe.output)


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    recipe = interrupted_run(tmp_path)
    for folder in list_checkpoints(tmp_path):
        damage_file(folder, "state.pt")
    with pytest.raises(RecipeError, match=r"no checkpoint in .* is whole:(?s:.*)000004: state\.pt.*(?s:.*)--overwrite"):
        resume(recipe, TrainingState.start(recipe, toy_world.world(recipe).module))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    module = toy_world.world(recipe).module
    save(recipe, TrainingState.start(recipe, module))
    module.register_parameter("new", torch.nn.Parameter(torch.zeros(3)))
    reason = r"does not fit the model.*2 tensors differ.*weights\.new: shape none in the folder, \(3,\) in this run"
    with pytest.raises(RecipeError, match=f"{reason}.*--overwrite"):
        resume(recipe, TrainingState.start(recipe, module))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    recipe = toy_world.recipe(tmp_path, save_every=1, keep=keep)
    main(recipe, toy_world.world(recipe))
    names = [folder.name for folder in list_checkpoints(tmp_path)]
    assert names == ["000006", "000005", "000004"][:keep]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted(names), "nothing else is left"


def test_a_checkpoint_says_what_it_is_of(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    save(recipe, TrainingState.start(recipe, toy_world.world(recipe).module))
    about = json.loads((list_checkpoints(tmp_path)[0] / "about.json").read_text())
    assert about["recipe"] == recipe.to_dict()
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert about["iteration"] == 0


def test_a_kill_while_a_checkpoint_is_replaced_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_world.recipe(tmp_path, keep=1)
    training = TrainingState.start(recipe, toy_world.world(recipe).module)
    training.skipped = 7
    save(recipe, training)
    replace_path = os.replace

    def killing_replace(source: Any, target: Any) -> None:
        if Path(source).suffix == ".partial" and Path(target).parent.name == "checkpoints":
            raise Killed
        replace_path(source, target)

    monkeypatch.setattr(os, "replace", killing_replace)
    with pytest.raises(Killed):
        save(recipe, training)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == []
    other = TrainingState.start(recipe, toy_world.world(recipe).module)
    assert resume(recipe, other)
    assert other.skipped == 7


@pytest.mark.parametrize("before", [0, 1])
def test_moments_are_those_that_were_saved(tmp_path: Path, before: int) -> None:
    """Also of a run that never took a step, whose optimiser has none: the first step is the first."""
    recipe = toy_world.recipe(tmp_path)
    first, other = (TrainingState.start(recipe, toy_world.world(recipe).module) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(p.shape, generator=generator) for p in first.parameters] for _ in range(before + 1)]
    for values in gradients[:before]:
        step(first, values)
    save(recipe, first)
    resume(recipe, other)
    for training in (first, other):
        step(training, gradients[-1])
    assert first.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(value, other.tensors[name]) for name, value in first.tensors.items())


def step(training: TrainingState, gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(training.parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    training.optimiser.step()


def test_stochastic_rounding_goes_on_bit_for_bit_and_leaves_torch_s_generator(tmp_path: Path) -> None:
    pytest.importorskip("torchao.optim")
    changes: dict[str, Any] = {
        "train": Trained(weights="bfloat16"),
        "optimiser": Optimiser(name="adamw8bit", rate=1e-3),
        "iterations": 4,
    }
    whole = toy_world.recipe(tmp_path / "whole", **changes)
    world = toy_world.world(whole)
    with torch.compiler.set_stance("force_eager"):
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        main(whole, world)
        assert torch.equal(torch.random.get_rng_state(), state)
        torn = toy_world.recipe(tmp_path / "torn", **changes)
        torch.manual_seed(2)
        killed_at(torn, 3)
        main(torn, toy_world.world(torn))
    assert_same_run(whole.output, torn.output)


def test_the_log_is_cut_back_and_writes_nan_as_null(tmp_path: Path) -> None:
    log = Log(tmp_path / METRICS)
    for i in range(1, 5):
        log.append({"kind": "iteration", "iteration": i, "loss": float("nan") if i == 2 else 0.5})
    log.append({"kind": "evaluation"})
    with log.path.open("a") as file:
        file.write('{"kind":')
    log.cut(3)
    assert log.read() == [{"kind": "iteration", "iteration": i, "loss": None if i == 2 else 0.5} for i in (1, 2, 3)]


def test_discard_leaves_other_files(tmp_path: Path) -> None:
    for name in (METRICS, f"{METRICS}.12.partial", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints" / "000002.partial").mkdir(parents=True)
    discard(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
