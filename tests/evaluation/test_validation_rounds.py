"""Validation rounds: what they measure, when they stop a run, which weights are saved; kills change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from matplotlib.image import imread
from torch import Tensor

from tests.builders import toy_world
from tests.builders.saved_runs import load_checkpoint, repeated
from tests.training.test_checkpoint import Killed, assert_same_run, killed_at
from trajsurgery import RecipeError
from trajsurgery.cli.train_command import main
from trajsurgery.evaluation import validation_rounds
from trajsurgery.evaluation.held_out import evaluate
from trajsurgery.runs import trainer
from trajsurgery.runs.reports import run_report, validation_report
from trajsurgery.training import training_loop
from trajsurgery.training.checkpoints import checkpoint
from trajsurgery.training.checkpoints.checkpoint import restore_best, resume
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import RunComponents, load
from trajsurgery.training.early_stopping import EarlyStopping
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.recipe import Recipe, differences
from trajsurgery.training.settings import Guards
from trajsurgery.training.training_loop import train

PROMPTS = tuple(Prompt(text, "any") for text in ("a blue circle", "a square near a circle", "three circles"))


class Dislikes(toy_world.LikesRed):
    """The opposite of the reward: it falls while the reward rises; with `until`, it rises until the reward is that."""

    def __init__(self, until: float = -9.0) -> None:
        self.until = until

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(super().__call__(images, prompts) - self.until).abs()


def recipe(output: Path, **changes: Any) -> Recipe:
    """Ten iterations with a validation round after every second one."""
    settings = {"every": 2, "images": 6, "patience": 2, **changes}
    return toy_world.recipe(output, guards=Guards(**settings), iterations=10, save_every=3)


def world(settings: Recipe, until: float = -9.0) -> RunComponents:
    return replace(toy_world.world(settings), metrics={"held": Dislikes(until)}, validation=PROMPTS)


def train_and_validate(
    settings: Recipe,
    until: float = 0.12,
    on_result: Callable[[validation_rounds.ValidationResult], None] = lambda _: None,
) -> TrainingState:
    """Run the training loop alone, from the checkpoint if there is one."""
    components = world(settings, until)
    training = TrainingState.start(settings, components.module)
    resume(settings, training)
    training.before = training.before or evaluate(settings, components).to_dict()
    validate = validation_rounds.validation_callback(settings, components, training, on_result)
    assert train(settings, components, training, lambda _: None, validate)
    return training


def validation_lines(output: Path) -> list[dict[str, Any]]:
    return [line for line in Log(output / METRICS).read() if line["kind"] == "look"]


def test_validation_uses_the_averaged_weights_and_changes_no_draw(tmp_path: Path) -> None:
    settings = recipe(tmp_path / "looked", patience=None)
    components, results = world(settings), list[validation_rounds.ValidationResult]()
    training = TrainingState.start(settings, components.module)
    assert train(
        settings,
        components,
        training,
        lambda _: None,
        validation_rounds.validation_callback(settings, components, training, results.append),
    )
    assert [look.iteration for look in results] == [0, 2, 4, 6, 8, 10]
    assert [line["iteration"] for line in validation_lines(settings.output)] == [0, 2, 4, 6, 8, 10]
    training.ema.copy_to(training.parameters)
    validation_settings = replace(settings, evaluation=replace(settings.evaluation, images=6))
    scores = evaluate(validation_settings, replace(components, heldout=PROMPTS))
    last = results[-1]
    assert last.reward == float(scores.reward.double().mean())
    assert last.metrics == {"held": float(scores.metrics["held"].double().mean())}
    assert scores.correct is not None
    assert last.rule == float(scores.correct.double().mean())
    assert last.spread["held"] == pytest.approx(float(scores.metrics["held"].std()), rel=1e-5)
    plain = toy_world.recipe(tmp_path / "plain", iterations=10, save_every=3)
    train_and_validate(plain)
    unguarded, guarded = load_checkpoint(plain.output), load_checkpoint(settings.output)
    for name in ("weights", "averages"):
        assert all(torch.equal(value, guarded[name][key]) for key, value in unguarded[name].items()), name
    logs = [[r for r in Log(f / METRICS).read() if r["kind"] == "iteration"] for f in (plain.output, settings.output)]
    assert repeated(logs[0]) == repeated(logs[1])
    assert not (settings.output / "best").exists()


def test_a_falling_score_stops_the_run_and_the_best_weights_are_saved(tmp_path: Path) -> None:
    settings = recipe(tmp_path)
    components = world(settings, until=0.12)
    first, averaged = [p.detach().clone() for p in components.module.parameters()], dict[int, list[Tensor]]()
    update = training_loop.update_averages

    def recording_update(averages: Any, parameters: Any) -> None:
        update(averages, parameters)
        averaged[averages.optimization_step] = [p.clone() for p in averages.shadow_params]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "update_averages", recording_update)
        summary = main(settings, components)
    assert summary is not None
    held = {look["iteration"]: look["metrics"]["held"] for look in validation_lines(tmp_path)}
    best = max(held, key=lambda i: held[i])
    assert 0 < best < summary["iterations"] < 10, (
        f"the best iteration is at an end, so this test checks nothing: {held}"
    )
    assert summary["iterations"] == best + 4
    assert summary["guards"] == {"by": "held", "best": best, "kept": best, "stopped": True}
    saved = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert all(map(torch.equal, saved.parameters(), averaged[best]))
    assert not all(map(torch.equal, saved.parameters(), first))
    assert [path.name for path in (tmp_path / "best").iterdir()] == [f"{best:06d}"]
    remarks = " ".join(run_report.remarks(summary))
    assert f"stopped early at iteration {best + 4}: scorer held" in remarks
    assert f"the averaged ones of iteration {best}" in remarks
    assert main(settings, world(settings, 0.12)) is not None
    assert len(validation_lines(tmp_path)) == len(held), "a stopped run does not go on"


def test_if_every_round_is_worse_the_untuned_weights_are_saved(tmp_path: Path) -> None:
    settings = recipe(tmp_path)
    untuned = [p.detach().clone() for p in toy_world.world(settings).module.parameters()]
    training = train_and_validate(settings, until=-9.0)
    assert (training.iteration, training.early_stopping.best) == (4, 0)
    assert not all(map(torch.equal, training.ema.shadow_params, untuned))
    restore_best(settings, training)
    assert all(map(torch.equal, training.ema.shadow_params, untuned))
    (tmp_path / "best" / "000000" / "state.pt").write_bytes(b"damaged")
    with pytest.raises(RecipeError, match=r"best/000000.*state\.pt: not as written.*--overwrite"):
        restore_best(settings, training)


def test_a_killed_run_with_guards_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_world = toy_world.world
    changes = {"metrics": {"held": Dislikes(0.12)}, "validation": PROMPTS}
    monkeypatch.setattr(toy_world, "world", lambda settings: replace(build_world(settings), **changes))
    whole, interrupted = (recipe(tmp_path / name, anchor=5.0) for name in ("whole", "torn"))
    training = train_and_validate(whole)
    for number in (3, 5):
        killed_at(
            interrupted,
            number,
            lambda components, state: validation_rounds.validation_callback(
                interrupted, components, state, lambda _: None
            ),
        )
    resumed = train_and_validate(interrupted)
    assert_same_run(whole.output, interrupted.output)
    names = [sorted(path.name for path in (r.output / "best").iterdir()) for r in (whole, interrupted)]
    assert names[0] == names[1] != []
    for settings_, state_ in ((whole, training), (interrupted, resumed)):
        restore_best(settings_, state_)
    assert all(map(torch.equal, training.ema.shadow_params, resumed.ema.shadow_params))


@pytest.mark.parametrize(
    "moment, number, until",
    [
        ("after the weights of the best look", 4, 0.12),
        ("after a look, before the next checkpoint", 4, 0.12),
        ("after a look at the iteration of the last checkpoint", 6, -9.0),
    ],
)
def test_a_kill_between_two_files_loses_nothing(
    tmp_path: Path, moment: str, number: int, until: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, interrupted = (recipe(tmp_path / name, patience=4) for name in ("whole", "torn"))
    train_and_validate(whole, until)
    save = checkpoint.save

    def killing_save(settings: Recipe, training: TrainingState) -> None:
        if training.iteration == number and "best" in moment:
            raise Killed
        save(settings, training)

    def killing_callback(look: validation_rounds.ValidationResult) -> None:
        if look.iteration == number:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", killing_save)
    with pytest.raises(Killed):
        train_and_validate(interrupted, until, killing_callback)
    monkeypatch.undo()
    train_and_validate(interrupted, until)
    assert_same_run(whole.output, interrupted.output)
    names = [sorted(path.name for path in (r.output / "best").iterdir()) for r in (whole, interrupted)]
    assert names[0] == names[1] != []


def test_early_stopping_counts_from_the_best() -> None:
    stopping = EarlyStopping()
    improved = [stopping.update(i, value) for i, value in enumerate([float("nan"), 0.1, 0.1, 0.3, float("inf"), 0.2])]
    assert improved == [False, True, False, True, False, False], "a score that is not finite is never the best"
    assert (stopping.best, stopping.waited) == (3, 2)
    stopping = EarlyStopping()
    assert [stopping.update(i, value) for i, value in enumerate([0.1, 0.1, 0.3, 0.2])] == [True, False, True, False]
    assert (stopping.last, stopping.best, stopping.waited, stopping.value) == (3, 2, 1, 0.3)


@pytest.mark.parametrize(
    "changes, missing, message",
    [
        ({}, {"metrics": {}}, r"There is none; name some with --evaluation\.metrics"),
        ({"by": "gone"}, {}, r"guards\.by = gone: .* There are held"),
        ({}, {"validation": ()}, r"Pass --guards\.prompts FILE"),
    ],
)
def test_what_the_guards_need_is_reported_before_images_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, missing: Any, message: str
) -> None:
    monkeypatch.setattr(trainer, "evaluate", lambda *_: pytest.fail("images were sampled"))
    settings = recipe(tmp_path, **changes)
    with pytest.raises(RecipeError, match=message):
        main(settings, replace(world(settings), **missing))


def test_a_part_of_the_reward_can_t_stop_the_run(tmp_path: Path) -> None:
    settings = replace(recipe(tmp_path, by="held"), reward="0.5*tiny+0.5*held")
    with pytest.raises(RecipeError, match="held is a part of the reward"):
        validation_rounds.check_guards(settings, world(settings))


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in (Guards(every=0), Guards(patience=3), Guards(every=1, patience=0), Guards(anchor=-1.0)):
        with pytest.raises(RecipeError, match=r"guards\."):
            Recipe(guards=wrong)
    with pytest.raises(RecipeError, match=r"guards\.anchor = nan"):
        Recipe(guards=Guards(anchor=float("nan")))


def test_a_run_of_a_version_without_guards_can_resume() -> None:
    saved = {name: value for name, value in Recipe().to_dict().items() if name != "guards"}
    assert differences(saved, Recipe().to_dict()) == []
    assert differences(saved, Recipe(guards=Guards(anchor=1.0)).to_dict()) == ["guards.anchor: 0.0 there, 1.0 here"]


def test_the_picture_has_validation_and_anchor_below_the_curve(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for i in range(1, 9):
        lines.append({"kind": "iteration", "iteration": i, "reward": i / 10, "anchor": None})
    plain = imread(run_report.draw_curve(tmp_path / "plain.png", "title", lines)).shape
    spread = {"reward": 0.1, "held": 0.2, "rule": 0.0}
    for i in (0, 4, 8):
        look = validation_rounds.ValidationResult(
            i, i / 10, {"held": -i / 10}, 0.5 if i else 1.0, spread, best=0, waited=i // 4, seconds=0.1
        )
        lines.append(json.loads(json.dumps(vars(look))))
        assert ("without a new best (iteration 0)" in validation_report.validation_line(look)) == bool(i)
    watched = imread(run_report.draw_curve(tmp_path / "watched.png", "title", lines)).shape
    with_anchor = [{**line, "anchor": 0.1} if line["kind"] == "iteration" else line for line in lines]
    both = imread(run_report.draw_curve(tmp_path / "both.png", "title", with_anchor)).shape
    assert plain[0] < watched[0] < both[0]


def test_validation_prompts_are_a_file_s_or_the_embedded_world_s(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n", encoding="utf-8")
    named, embedded, unnamed = (load(Recipe(guards=Guards(5, name))).validation for name in (str(file), "tiny", None))
    assert named == (Prompt("a red circle"),)
    assert len(embedded) > 1
    assert embedded == unnamed
