"""Out of memory: real failures of torch's allocator end in an error that names the part and what takes less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import toy_world
from tests.builders.small_pipelines import PIPELINES
from trajsurgery import plan_memory
from trajsurgery.cli.train_command import main
from trajsurgery.dry_run.memory_advice import memory_advice
from trajsurgery.errors import OutOfMemoryError
from trajsurgery.evaluation.held_out import evaluate
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.checks.trial import check_gradient_is_finite
from trajsurgery.training.components import PromptCache, RunComponents
from trajsurgery.training.faults.memory_errors import is_out_of_memory, memory_of
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import training_step

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")  # the dry run's, of RMSNorm under autocast


def exhaust(*_: Any) -> None:
    """Ask torch's allocator for more than any machine has."""
    torch.empty(2**60, dtype=torch.uint8)


class Exhausts(torch.autograd.Function):
    """The identity, whose backward pass runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        exhaust()


class Greedy(toy_world.LikesRed):
    """A reward that runs out of memory."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        exhaust()
        return super().__call__(images, prompts)


class GreedyBackward(toy_world.LikesRed):
    """A reward whose gradient runs out of memory."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().__call__(Exhausts.apply(images), prompts)


def in_backward(world: RunComponents) -> RunComponents:
    world.module.register_forward_hook(lambda _, __, output: (Exhausts.apply(output[0]), *output[1:]))
    return world


def in_forward(world: RunComponents) -> RunComponents:
    world.module.register_forward_hook(exhaust)
    return world


def in_decoder(world: RunComponents) -> RunComponents:
    world.pipe.vae.decoder.register_forward_hook(exhaust)
    return world


PARTS: dict[str, Callable[[RunComponents], RunComponents]] = {
    "the rollout": in_forward,
    "decoding": in_decoder,
    "the reward": lambda world: replace(world, reward=Greedy()),
    "the gradient of reward and decoder": lambda world: replace(world, reward=GreedyBackward()),
    "the gradient sweep": in_backward,
}


@pytest.mark.parametrize("memory", ["split", "staged"])
@pytest.mark.parametrize("part", PARTS)
def test_the_part_of_an_iteration_is_named(part: str, memory: Any, tmp_path: Path) -> None:
    settings = toy_world.recipe(tmp_path)
    settings = replace(settings, rollout=replace(settings.rollout, memory=memory))
    world = PARTS[part](toy_world.world(settings))
    training = TrainingState.start(settings, world.module)
    with pytest.raises(OutOfMemoryError, match=rf"out of memory in {part}: this process used .* GiB.*can't allocate"):
        training_step(settings, world, PromptCache(world.pipe, world.texts), training, 0.9)


def test_other_parts_of_a_run_are_named(tmp_path: Path) -> None:
    settings = toy_world.recipe(tmp_path)
    world = in_forward(toy_world.world(settings))
    with pytest.raises(OutOfMemoryError, match=r"held-out images \(--evaluation\.batch 4 at once\)"):
        evaluate(settings, world)
    with pytest.raises(OutOfMemoryError, match="the trial of one model call"):
        check_gradient_is_finite(settings, world, lambda _: None)
    plain = toy_world.world(settings)
    training = TrainingState.start(settings, plain.module)
    training.optimiser.step = exhaust
    with pytest.raises(OutOfMemoryError, match="the optimiser's step"):
        training_step(settings, plain, PromptCache(plain.pipe, plain.texts), training, 0.9)


def test_other_errors_pass_and_a_gpu_s_are_known() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_of("the rollout"):
        raise RuntimeError("shapes differ")
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    inner = pytest.raises(OutOfMemoryError, match=r"in decoding: .*The allocator: CUDA out of memory\. Tried")
    with inner, memory_of("the rollout"), memory_of("decoding"):
        raise error


def of_small_model(tmp_path: Path) -> Recipe:
    """A recipe whose dry run counts a model of two blocks."""
    PIPELINES["flux"]().pipe.save_pretrained(tmp_path / "model")
    return toy_world.recipe(tmp_path / "run", model=str(tmp_path / "model"))


def test_a_run_says_what_takes_less_with_the_dry_run_s_figures(tmp_path: Path) -> None:
    settings = of_small_model(tmp_path)
    with pytest.raises(OutOfMemoryError) as error:
        main(settings, PARTS["the gradient sweep"](toy_world.world(settings)))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("out of memory in the trial of one model call")
    now = plan_memory(settings, kernels="cpu").peak / 2**20
    assert lines[1] == f"By the dry run an iteration takes {now:.1f} MiB. What takes less, in order of effect:"
    figures = [float(line.split()[0]) for line in lines[2:]]
    assert figures == sorted(figures)
    one = replace(settings, rollout=replace(settings.rollout, at_once=1))
    expected = f"{plan_memory(one, kernels='cpu').peak / 2**20:.1f} MiB  --rollout.at-once 1 "
    assert any(expected in line for line in lines[2:])


def test_the_cheapest_setting_that_fits_comes_last(tmp_path: Path) -> None:
    settings = of_small_model(tmp_path)
    now = plan_memory(settings).peak
    advice = memory_advice(settings, 1, 0.8 * now, "cuda")
    assert advice[-1].startswith("The cheapest that fits, ")
    assert "--" in advice[-1]
    unknown = memory_advice(replace(settings, model="nobody/nothing"), 1, None, "cpu")
    assert "--rollout.at-once 1, --rollout.checkpointing" in unknown[0]
