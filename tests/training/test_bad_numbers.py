"""Numbers that are not finite: the part in which they were first, with prompts, seeds and times, in real iterations."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.builders import toy_world
from tests.training.test_trial import WithoutFiniteGradient
from trajsurgery import DRTune, LeapAlign
from trajsurgery.cli.train_command import main
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache, RunComponents
from trajsurgery.training.faults.bad_numbers import BadNumbers, first_not_finite
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import StepRecord, training_step


class NotOfBlue(toy_world.LikesRed):
    """NaN for prompts with a word; with `gradient` the score is finite and its gradient is not."""

    def __init__(self, word: str = "blue", gradient: bool = False) -> None:
        self.word, self.gradient = word, gradient

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = super().__call__(images, prompts)
        spoil = (lambda score: score + (score * 0).sqrt()) if self.gradient else (lambda score: score * torch.nan)
        pairs = zip(scores, prompts, strict=True)
        return torch.stack([spoil(score) if self.word in prompt else score for score, prompt in pairs])


def spoil_velocity(world: RunComponents) -> RunComponents:
    """The third call of a rollout is NaN for its second sample: t = 3 of 5."""
    calls = [0]

    def spoil(_: Any, __: Any, output: Any) -> Any:
        calls[0] += 1
        if calls[0] % 5 != 3:
            return output
        return (torch.cat([output[0][:1], output[0][1:2] * torch.nan, output[0][2:]]), *output[1:])

    world.module.register_forward_hook(spoil)
    return world


def spoil_decoder(world: RunComponents) -> RunComponents:
    with torch.no_grad():
        world.pipe.vae.decoder.conv_out.bias.fill_(torch.nan)
    return world


def spoil_gradient(world: RunComponents) -> RunComponents:
    world.module.register_forward_hook(lambda _, __, output: (WithoutFiniteGradient.apply(output[0]), *output[1:]))
    return world


FAULTS: dict[str, tuple[Callable[[RunComponents], RunComponents], Callable[[int, str], bool]]] = {
    "the velocity at t = 3": (spoil_velocity, lambda row, _: row == 1),
    "the decoder's output": (spoil_decoder, lambda *_: True),
    "the reward": (lambda world: replace(world, reward=NotOfBlue()), lambda _, text: "blue" in text),
    "the gradient of reward and decoder": (
        lambda world: replace(world, reward=NotOfBlue(gradient=True)),
        lambda _, text: "blue" in text,
    ),
    "the transformer's gradient": (spoil_gradient, lambda *_: True),
}


def iteration(settings: Recipe, world: RunComponents) -> tuple[StepRecord, list[str]]:
    """One iteration in which a blue square is drawn, and its prompts."""
    texts = ["a circle", "two squares", "a blue square", "a red circle"]
    world = replace(world, draw=lambda count, _: texts[:count])
    training = TrainingState.start(settings, world.module)
    return training_step(settings, world, PromptCache(world.pipe, world.texts), training, 0.9), texts


@pytest.mark.parametrize("memory", ["split", "staged"])
@pytest.mark.parametrize("part", FAULTS)
def test_the_part_that_was_first_is_named_with_its_samples(part: str, memory: Any, tmp_path: Path) -> None:
    settings = toy_world.recipe(tmp_path, LeapAlign())
    settings = replace(settings, rollout=replace(settings.rollout, memory=memory))
    spoil, is_bad = FAULTS[part]
    record, texts = iteration(settings, spoil(toy_world.world(settings)))
    rows = [row for row, text in enumerate(texts) if is_bad(row, text)]
    (bad,) = record.bad
    assert record.skipped
    assert (bad.part, bad.prompts) == (part, tuple(texts[row] for row in rows))
    seeds = iteration(settings, spoil_gradient(toy_world.world(settings)))[0].bad[0].seeds
    assert bad.seeds == tuple(seeds[row] for row in rows)


def test_samples_of_several_rollouts_and_plans_are_told_apart(tmp_path: Path) -> None:
    settings = toy_world.recipe(tmp_path, LeapAlign())
    settings = replace(settings, rollout=replace(settings.rollout, at_once=2, plans=2))
    record, _ = iteration(settings, replace(toy_world.world(settings), reward=NotOfBlue()))
    assert [(bad.part, bad.prompts) for bad in record.bad] == [("the reward", ("a blue square",))]


def test_a_sound_iteration_has_none_and_another_output_is_looked_at_too(tmp_path: Path) -> None:
    settings = toy_world.recipe(tmp_path, DRTune(last=3))
    record, _ = iteration(settings, toy_world.world(settings))
    assert record.bad == ()
    assert not record.skipped


class NeverWaits(TorchDispatchMode):
    """Fails where a value on the device is read by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host waits for the device"
        return func(*args, **(kwargs or {}))


def test_places_are_those_of_the_first_tensor_and_nothing_waits() -> None:
    latents = {t: torch.zeros(4, 3, 2) for t in range(4)}
    velocities = {t: torch.zeros(4, 3, 2) for t in range(1, 4)}
    velocities[2][1, 0, 0] = torch.inf
    velocities[1][1:3, 2, 1] = torch.nan
    scores = torch.tensor([0.0, torch.nan, torch.nan, torch.nan])
    trajectory = Trajectory(torch.linspace(1, 0, 4), latents, velocities)
    image = torch.zeros(4, 3, 2, 2)
    with NeverWaits():
        places = first_not_finite(trajectory, ((latents[0],), (image,), (image.sum((1, 2, 3)), scores), (latents[0],)))
    assert places.tolist() == [0, 2, 1, -3]


def test_a_run_shows_and_logs_what_it_skipped(tmp_path: Path) -> None:
    """In the progress, in metrics.jsonl and in the summary; held-out scores that are not finite are counted."""
    settings = toy_world.recipe(tmp_path, iterations=3)
    plain = toy_world.world(settings)
    texts = iter([["a blue square", *toy_world.TEXTS[:3]], *[list(toy_world.TEXTS[:2]) * 2] * 2] * 2)
    world = replace(plain, reward=NotOfBlue(), draw=lambda *_: next(texts))
    out = io.StringIO()
    summary = main(settings, world, Console(file=out, width=400))
    line = Log(tmp_path / METRICS).read()[0]
    printed = out.getvalue()
    assert line["skipped"]
    assert line["bad"][0]["part"] == "the reward"
    assert line["bad"][0]["prompts"] == ["a blue square"] * 2
    assert f"the reward is not finite for 'a blue square' (seed {line['bad'][0]['seeds'][0]})" in printed
    assert f"the plan's times are {', '.join(map(str, line['times']))}" in printed
    assert "skipped iterations: 1 (not finite: the reward 1)" in printed
    assert summary is not None
    assert summary["not_finite"] == {"reward": [2, 2]}
    assert "scores of reward that are not finite, left out with their pairs: 2 before, 2 after, of 10" in printed
    assert json.dumps(summary["reward_gain"]) != "NaN"


def test_many_samples_are_named_by_the_first_three() -> None:
    words = str(BadNumbers("the reward", tuple("abcde"), tuple(range(5))))
    assert words == "the reward is not finite for 'a' (seed 0), 'b' (seed 1), 'c' (seed 2) and 2 more"
