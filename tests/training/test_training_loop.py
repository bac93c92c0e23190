"""The training loop on a small FluxPipeline: methods learn, memory modes agree, non-finite steps are skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import toy_world
from tests.builders.problems import distance
from tests.builders.saved_runs import load_checkpoint, tensors
from trajsurgery import DRaFTLV, DRTune, LeapAlign, RecipeError, ReFL
from trajsurgery.cli import train_command
from trajsurgery.runs import trainer
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache, RunComponents, check_reward, pipeline_arguments
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.settings import Objective, Optimiser
from trajsurgery.training.training_loop import PATIENCE, StepRecord, iteration_generator, train, training_step

METHODS: dict[str, Method] = {
    "leapalign": LeapAlign(),
    "drtune": DRTune(last=3),
    "refl": ReFL(last=3),
    "draft_lv": DRaFTLV(n=1),
}


def run_loop(recipe: Recipe, world: RunComponents | None = None) -> tuple[TrainingState, list[StepRecord]]:
    """Run the training loop alone."""
    world, records = world or toy_world.world(recipe), list[StepRecord]()
    training = TrainingState.start(recipe, world.module)
    assert train(recipe, world, training, records.append)
    return training, records


def gradient(recipe: Recipe, method: Method, **rollout: Any) -> list[Tensor]:
    """Return the unclipped gradient of the first iteration; the optimizer does not step."""
    recipe = replace(
        recipe,
        method=method,
        rollout=replace(recipe.rollout, **rollout),
        optimiser=Optimiser(rate=1e-9, clip=1e9),
    )
    world = toy_world.world(recipe)
    training, gradients = TrainingState.start(recipe, world.module), list[Tensor]()
    training.optimiser.step = lambda: gradients.extend(p.grad.clone() for p in training.parameters)
    training_step(recipe, world, PromptCache(world.pipe, world.texts), training, 0.9)
    return gradients


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, METHODS[name])
    world = toy_world.world(recipe)
    frozen = {n: p.clone() for part in (world.pipe.vae, world.pipe.text_encoder) for n, p in part.named_parameters()}
    training, records = run_loop(recipe, world)
    assert records[-1].reward > records[0].reward + 0.03
    assert [record.iteration for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record.grad_norm > 0 and not record.skipped for record in records)
    assert training.iteration == 6
    for part in (world.pipe.vae, world.pipe.text_encoder):
        assert all(torch.equal(p, frozen[n]) and p.grad is None for n, p in part.named_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_all_memory_modes_give_one_gradient(name: str, tmp_path: Path) -> None:
    recipe, method = toy_world.recipe(tmp_path), METHODS[name]
    expected = gradient(recipe, method)
    assert distance(gradient(recipe, method, memory="recompute"), expected) < 1e-5
    assert distance(gradient(recipe, method, memory="staged"), expected) < 1e-5
    assert distance(gradient(recipe, method, memory="split"), expected) < 1e-5
    assert distance(gradient(recipe, method, checkpointing=True), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # RMSNorm under autocast is not fused on a CPU
@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_close_to_float32_and_alike_in_all_memory_modes(name: str, tmp_path: Path) -> None:
    recipe, method = toy_world.recipe(tmp_path), METHODS[name]
    retained = gradient(recipe, method, precision="bfloat16")
    assert all(g.dtype == torch.float32 for g in retained)
    assert 1e-4 < distance(retained, gradient(recipe, method)) < 0.2  # bfloat16 has less than three digits
    for memory in ("recompute", "staged", "split"):
        assert distance(gradient(recipe, method, precision="bfloat16", memory=memory), retained) < 1e-5


def test_a_batch_from_several_rollouts_is_the_same_batch(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    expected = gradient(recipe, LeapAlign())
    for at_once in (1, 2, 3):
        assert distance(gradient(recipe, LeapAlign(), at_once=at_once), expected) < 1e-5


def test_the_log_has_a_line_an_iteration(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    _, records = run_loop(recipe)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [record.iteration for record in records]
    names = ("kind", "iteration", "reward", "loss", "grad_norm", "clamped", "weight", "closed", "skipped", "times")
    assert lines[0].keys() == {*names, "seconds", "idle", "bad", "anchor", "distance", "parts", "memory"}
    plan = recipe.method.draw(recipe.rollout.steps, iteration_generator(recipe.seed, 1, "plan"))
    assert lines[0]["times"] == sorted({n.t for n in plan.nodes if n.op == "velocity"}, reverse=True)
    assert 0 <= lines[0]["clamped"] <= 1
    assert lines[0]["weight"] > 0


def test_the_reward_logged_is_that_of_the_generated_images(tmp_path: Path) -> None:
    """The same draws give the same x_0 whatever the plan's output."""
    first = {name: run_loop(toy_world.recipe(tmp_path / name, m, iterations=1))[1][0] for name, m in METHODS.items()}
    for record in first.values():
        assert record.reward == pytest.approx(first["leapalign"].reward, abs=1e-6)


def test_no_text_encoder_runs_in_the_loop(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = toy_world.world(recipe)
    embeddings, training = (
        PromptCache(world.pipe, world.texts, pipeline_arguments(recipe)),
        TrainingState.start(recipe, world.module),
    )
    for part in (world.pipe.text_encoder, world.pipe.text_encoder_2):
        part.register_forward_hook(lambda *_: pytest.fail("a prompt was encoded in the loop"))
    training_step(recipe, world, embeddings, training, 0.9)


def test_a_closed_hinge_gives_no_gradient(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, objective=replace(toy_world.recipe(tmp_path).objective, threshold=-5.0))
    world, records = toy_world.world(recipe), list[StepRecord]()
    with pytest.raises(RecipeError, match="nothing was trained"):
        train(recipe, world, TrainingState.start(recipe, world.module), records.append)
    assert len(records) == 6
    assert all(record.loss == 0 and record.grad_norm == 0 and record.closed == 1 for record in records)


def test_ema_is_the_moving_average(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=4, ema=0.3)
    world = toy_world.world(recipe)
    training = TrainingState.start(recipe, world.module)
    averages = [p.detach().clone() for p in training.parameters]

    def watch(record: StepRecord) -> None:
        step = record.iteration - 1
        decay = min((1 + step) / (10 + step), 0.3) if step else 0.0
        for average, p in zip(averages, training.parameters, strict=True):
            average.mul_(decay).add_((1 - decay) * p.detach())

    train(recipe, world, training, watch)
    assert distance(training.ema.shadow_params, averages) < 1e-6


class Failing(toy_world.LikesRed):
    """A reward with NaN scores, or NaN gradients, at some calls."""

    def __init__(self, calls: Sequence[int], gradient: bool = False) -> None:
        self.calls, self.gradient, self.count = calls, gradient, 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.count += 1
        scores = super().__call__(images, prompts)
        if self.count not in self.calls:
            return scores
        return scores + (torch.zeros_like(scores) * scores).sqrt() if self.gradient else scores * torch.nan


@pytest.mark.parametrize("gradient", [False, True])
def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path, gradient: bool) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = replace(toy_world.world(recipe), reward=Failing((2, 4), gradient))
    training, weights = TrainingState.start(recipe, world.module), dict[int, list[Tensor]]()

    def watch(record: StepRecord) -> None:
        weights[record.iteration] = [p.detach().clone() for p in training.parameters]

    assert train(recipe, world, training, watch)
    lines = Log(tmp_path / METRICS).read()
    assert [line["iteration"] for line in lines if line["skipped"]] == [2, 4]
    assert training.skipped == 2
    assert training.ema.optimization_step == 4
    assert all(map(torch.equal, weights[1], weights[2]))
    assert not all(map(torch.equal, weights[2], weights[3]))
    assert lines[1]["grad_norm"] is None
    assert (lines[1]["loss"] is None) != gradient


def test_three_non_finite_steps_stop_the_run_and_save_the_last_good_weights(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, save_every=100)
    world = replace(toy_world.world(recipe), reward=Failing(range(3, 99)))
    training, weights = TrainingState.start(recipe, world.module), dict[int, list[Tensor]]()

    def watch(record: StepRecord) -> None:
        weights[record.iteration] = [p.detach().clone() for p in training.parameters]

    message = r"3 in a row with numbers .* not finite .*the reward is.* The weights are finite"
    with pytest.raises(RecipeError, match=message):
        train(recipe, world, training, watch)
    assert training.iteration == 2 + PATIENCE
    assert all(map(torch.equal, load_checkpoint(tmp_path)["weights"].values(), weights[2]))


def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    """A step makes the weights overflow: the checkpoint has the last finite ones."""
    recipe = toy_world.recipe(tmp_path, save_every=1, iterations=8)
    world = toy_world.world(recipe)
    training = TrainingState.start(recipe, world.module)

    def watch(record: StepRecord) -> None:
        if record.iteration == 3:
            training.optimiser.param_groups[0]["lr"] = float("inf")

    with pytest.raises(RecipeError, match="weights are not finite any more; the last checkpoint whose weights are"):
        train(recipe, world, training, watch)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint["iteration"] == 3
    assert all(bool(value.isfinite().all()) for value in tensors([checkpoint["weights"], checkpoint["averages"]]))


def test_nan_images_do_not_reach_the_reward(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=2)
    world = toy_world.world(recipe)

    class Strict(toy_world.LikesRed):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            assert bool(images.isfinite().all())
            return super().__call__(images, prompts)

    with torch.no_grad():
        world.pipe.vae.decoder.conv_out.bias.fill_(torch.nan)
    records, training = list[StepRecord](), TrainingState.start(recipe, world.module)
    with pytest.raises(RecipeError, match=r"nothing was trained .* the decoder's output is not finite"):
        train(recipe, replace(world, reward=Strict()), training, records.append)
    assert all(record.skipped for record in records)


def test_a_reward_that_detaches_is_an_error(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = replace(toy_world.world(recipe), reward=lambda images, prompts: images.detach().mean((1, 2, 3)))
    with pytest.raises(RecipeError, match="carry no gradient"):
        run_loop(replace(recipe, objective=replace(recipe.objective, threshold=1.0)), world)


def test_a_reward_without_a_threshold_is_an_error(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = replace(toy_world.world(recipe), reward=lambda images, prompts: images.mean((1, 2, 3)))
    with pytest.raises(RecipeError, match=r"--objective\.threshold"):
        run_loop(recipe, world)


class DetachesImages(toy_world.LikesRed):
    """A reward that detaches the images; only a parameter of the reward gets a gradient."""

    weight = torch.ones((), requires_grad=True)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().__call__(images.detach(), prompts) * self.weight


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda images, prompts: images.mean((1, 2, 3)), r"--objective\.threshold"),
        (DetachesImages(), "carry no gradient"),
    ],
)
def test_an_unusable_reward_is_refused_before_images_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: Any, message: str
) -> None:
    recipe = toy_world.recipe(tmp_path)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: pytest.fail("images were sampled"))
    with pytest.raises(RecipeError, match=message):
        train_command.main(recipe, replace(toy_world.world(recipe), reward=reward))


@pytest.mark.parametrize(
    "scores, message", [(torch.zeros(()), r"shape \(\)"), ([0.5], "list"), (torch.zeros(1), "carry")]
)
def test_a_reward_must_return_one_score_an_image(tmp_path: Path, scores: Any, message: str) -> None:
    recipe = toy_world.recipe(tmp_path, objective=Objective(threshold=1.0))
    with pytest.raises(RecipeError, match=message):
        check_reward(recipe, replace(toy_world.world(recipe), reward=lambda images, prompts: scores))


def test_draws_follow_from_seed_iteration_and_purpose() -> None:
    drawn = {
        (seed, number, purpose): int(torch.randint(2**40, (), generator=iteration_generator(seed, number, purpose)))
        for seed in range(3)
        for number in range(5)
        for purpose in ("plan", "prompts", "noise", "renoise")
    }
    assert len(set(drawn.values())) == len(drawn)
