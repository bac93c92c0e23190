"""The host waits for the device once an iteration, and what it checks is raised all the same."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import toy_world
from tests.builders.host_waits import HostWaits
from trajsurgery import (
    SRPO,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    ReFL,
    RewardError,
    SamplerError,
    WholeTrajectory,
    operate,
)
from trajsurgery.pipelines import scheduler
from trajsurgery.rewards.contract import Reward
from trajsurgery.surgery.deferred_checks import deferred_checks, require
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache, RunComponents
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.settings import Decoder
from trajsurgery.training.training_loop import StepRecord, training_step

METHODS: dict[str, Method] = {
    "LeapAlign": LeapAlign(),
    "DRTune": DRTune(last=3),
    "ReFL": ReFL(last=3),
    "DRaFT-LV": DRaFTLV(),
    "SRPO": SRPO(),
    "FlowBP-Sparse": FlowBPSparse(),
    "FlowBP-Bridge": FlowBPBridge(),
    "FlowBP-Lagrange": FlowBPLagrange(),
    "whole trajectory": WholeTrajectory(),  # whose calls begin at T
}
WAYS = [
    *((name, memory) for name in METHODS for memory in ("split", "staged")),
    *(("LeapAlign", "retain"), ("LeapAlign", "recompute"), ("DRaFT-LV", "retain")),
]


class Strict(Reward):
    """A reward of the library's own kind, which checks its images and scores."""

    name, threshold = "strict", 0.9

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.factor * toy_world.LikesRed()(images, prompts)


@cache
def world() -> RunComponents:
    """A world on the CPU, whose prompts are encoded."""
    settings = toy_world.recipe(Path("unused"))
    parts = replace(toy_world.world(settings), reward=Strict())
    PromptCache(parts.pipe, parts.texts)
    return parts


def iterations(settings: Recipe, parts: RunComponents, training: TrainingState, count: int) -> list[StepRecord]:
    embeddings = PromptCache(parts.pipe, parts.texts)
    return [training_step(settings, parts, embeddings, training, 0.9) for _ in range(count)]


def counted(settings: Recipe, parts: RunComponents, training: TrainingState) -> list[str]:
    """The lines that wait in one iteration."""
    mode = HostWaits([*parts.module.parameters(), *parts.pipe.vae.parameters()])
    pipe, sampler = parts.pipe, parts.pipe.scheduler
    with ExitStack() as stack:
        for owner, name in ((pipe, "prepare_latents"), (sampler, "set_timesteps")):
            moved = mode.moving(getattr(type(owner), name).__get__(owner), owner if owner is sampler else None)
            stack.enter_context(scheduler.shadow_attribute(owner, name, moved))
        stack.enter_context(mode)
        iterations(settings, parts, training, 1)
    return mode.lines


@pytest.mark.parametrize("name, memory", WAYS)
def test_an_iteration_waits_once(name: str, memory: Any, tmp_path: Path) -> None:
    """After the first one, which reads the sampler's times and looks for parameters without gradient."""
    settings, parts = toy_world.recipe(tmp_path, METHODS[name]), world()
    settings = replace(settings, rollout=replace(settings.rollout, memory=memory))
    training = TrainingState.start(settings, parts.module)
    iterations(settings, parts, training, 1)
    for _ in range(2):
        (line,) = counted(settings, parts, training)
        assert line.startswith("tolist in training_loop.py")


def test_the_counter_sees_a_reward_that_reads(tmp_path: Path) -> None:
    def read(images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert images.detach().mean() < 2
        return toy_world.LikesRed()(images, prompts)

    settings, parts = toy_world.recipe(tmp_path), replace(world(), reward=read)
    training = TrainingState.start(settings, parts.module)
    iterations(settings, parts, training, 1)
    assert len(counted(settings, parts, training)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees(tmp_path: Path) -> None:
    """CUDA's own record of its waits, of those that the library's lines make (diffusers moves noise and times)."""
    settings = toy_world.recipe(tmp_path, device="cuda", decoder=Decoder(stay=True))
    parts = replace(toy_world.world(settings), reward=Strict())
    training = TrainingState.start(settings, parts.module)
    iterations(settings, parts, training, 2)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            iterations(settings, parts, training, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{wait.filename}:{wait.lineno}" for wait in waits if "/trajsurgery/" in wait.filename]
    assert len(lines) == 1, lines


def test_a_reward_s_check_is_raised_at_the_end_of_the_iteration(tmp_path: Path) -> None:
    settings, parts = toy_world.recipe(tmp_path), replace(world(), reward=Strict(torch.inf))
    with pytest.raises(RewardError, match="scores that are not finite"):
        iterations(settings, parts, TrainingState.start(settings, parts.module), 1)


@pytest.mark.parametrize("value, message", [(2.0, "received values from 2 to 2"), (torch.nan, "images with NaN")])
def test_a_deferred_check_has_the_same_error(value: float, message: str) -> None:
    images = torch.full((1, 3, 4, 4), value)
    with pytest.raises(RewardError, match=message) as now:
        Strict()(images, ["a circle"])
    with deferred_checks() as checks:
        Strict()(images, ["a circle"])
    flags = checks.flags(images)
    assert flags.dtype == images.dtype
    with pytest.raises(RewardError) as later:
        checks.raise_failed(flags.tolist())
    assert str(now.value) == str(later.value)


def test_an_error_inside_the_block_comes_after_a_check_that_failed_before_it() -> None:
    def block(passed: bool) -> None:
        with deferred_checks():
            require(torch.tensor(passed), lambda: SamplerError("first"))
            raise RewardError("second")

    with pytest.raises(SamplerError, match="first"):
        block(False)
    with pytest.raises(RewardError, match="second"):
        block(True)
    with pytest.raises(SamplerError, match="now"):
        require(torch.tensor(False), lambda: SamplerError("now"))


def test_a_replay_with_another_velocity_is_refused_at_the_end(tmp_path: Path) -> None:
    """The transformer's calls depend on how many there were: those of the staged sweep differ from the rollout's."""
    settings = toy_world.recipe(tmp_path)
    settings = replace(settings, rollout=replace(settings.rollout, memory="staged"))
    parts = replace(toy_world.world(settings), reward=Strict())
    calls = [0]

    def drift(_: Any, __: Any, output: Any) -> Any:
        calls[0] += 1
        return (output[0] * calls[0], *output[1:])

    parts.module.register_forward_hook(drift)
    with pytest.raises(SamplerError, match="gives another velocity than in its rollout"):
        iterations(settings, parts, TrainingState.start(settings, parts.module), 1)


def test_a_schedule_that_changes_between_iterations_is_refused(tmp_path: Path) -> None:
    settings, parts = toy_world.recipe(tmp_path), world()
    training, sampler = TrainingState.start(settings, parts.module), parts.pipe.scheduler
    iterations(settings, parts, training, 2)
    set_timesteps = sampler.set_timesteps

    @wraps(set_timesteps)
    def shifted(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        sampler.sigmas = sampler.sigmas * 0.9

    with (
        scheduler.shadow_attribute(sampler, "set_timesteps", shifted),
        pytest.raises(SamplerError, match="from the same arguments before"),
    ):
        iterations(settings, parts, training, 1)


def test_the_step_that_is_known_to_be_euler_s_is_measured_to_be() -> None:
    pipe = world().pipe
    for stochastic in (False, True):
        pipe.scheduler.register_to_config(stochastic_sampling=stochastic)
        try:
            with operate(pipe) as surgery:
                pipe("a circle", num_inference_steps=4, height=16, width=16, output_type="latent")
        finally:
            pipe.scheduler.register_to_config(stochastic_sampling=False)
        trajectory = surgery.trajectory
        for t in range(4, 0, -1):
            assert trajectory.is_step(t) == trajectory._is_euler(t)  # pyright: ignore[reportPrivateUsage]
        assert not (stochastic and trajectory.is_step(4))
