"""The trial step before a run: a kernel with non-finite gradients is replaced, other faults end the run at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from tests.builders import toy_world
from trajsurgery import DRaFTLV, RecipeError, SamplerError
from trajsurgery.cli import train_command
from trajsurgery.runs import trainer
from trajsurgery.training.checks import trial
from trajsurgery.training.components import check_reward
from trajsurgery.training.settings import Guards

REGISTRY = attention_dispatch._AttentionBackendRegistry
NATIVE, MATH = attention_dispatch.AttentionBackendName.NATIVE, attention_dispatch.AttentionBackendName._NATIVE_MATH


class WithoutFiniteGradient(torch.autograd.Function):
    """The identity; NaN in the backward pass, as cuDNN's attention gave on an H100."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.nan


def faulty(kernel: Any) -> Any:
    def attend(*args: Any, **kwargs: Any) -> Any:
        return WithoutFiniteGradient.apply(kernel(*args, **kwargs))

    return attend


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    """Diffusers' attention kernels, which are global settings."""
    active, backends = REGISTRY._active_backend, dict(REGISTRY._backends)
    yield REGISTRY._backends
    REGISTRY._backends.clear()
    REGISTRY._backends.update(backends)
    REGISTRY._active_backend = active


def lines_of(recipe: Any) -> list[str]:
    lines: list[str] = []
    trial.check_gradient_is_finite(recipe, toy_world.world(recipe), lines.append)
    return lines


def test_a_correct_model_passes_without_a_warning_and_without_a_gradient_left(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = toy_world.world(recipe)
    weights = [p.clone() for p in world.module.parameters()]
    trial.check_gradient_is_finite(recipe, world, lambda line: pytest.fail(line))
    assert all(p.grad is None for p in world.module.parameters())
    assert all(map(torch.equal, world.module.parameters(), weights))


def test_a_faulty_kernel_is_replaced_and_the_new_one_named(tmp_path: Path, kernels: Any) -> None:
    kernels[NATIVE] = faulty(kernels[NATIVE])
    recipe = toy_world.recipe(tmp_path)
    world, lines = toy_world.world(recipe), list[str]()
    trial.check_gradient_is_finite(recipe, world, lines.append)
    assert len(lines) == 1
    assert "_native_math" in lines[0]
    trial.check_gradient_is_finite(recipe, world, lambda line: pytest.fail(line))


def test_a_kernel_of_the_recipe_is_not_replaced(tmp_path: Path, kernels: Any) -> None:
    kernels[NATIVE] = faulty(kernels[NATIVE])
    with pytest.raises(RecipeError, match=r"not finite: the first that is not is the gradient at the output of .*attn"):
        lines_of(toy_world.recipe(tmp_path, attention="native"))


def test_a_run_without_a_working_kernel_ends_before_any_image(
    tmp_path: Path, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels[NATIVE], kernels[MATH] = faulty(kernels[NATIVE]), faulty(kernels[MATH])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: pytest.fail("images were sampled"))
    recipe = toy_world.recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"Nor is it with _native_math"):
        train_command.main(recipe, toy_world.world(recipe))


def test_an_unknown_kernel_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean '_native_math'"):
        toy_world.world(toy_world.recipe(tmp_path, attention="native_math"))


def test_non_finite_weights_are_named(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = toy_world.world(recipe)
    with torch.no_grad():
        world.module.get_submodule("single_transformer_blocks.0.proj_mlp").weight[0, 0] = torch.nan
    with pytest.raises(RecipeError, match=r"the output of single_transformer_blocks\.0\.proj_mlp"):
        trial.check_gradient_is_finite(recipe, world, lambda line: pytest.fail(line))


def drifting_world(settings: Any) -> Any:
    """The toy world with a model that sees other latents from call to call, which no replay can repeat."""
    components, calls = toy_world.world(settings), list[int]()

    def drift(module: Any, args: Any, kwargs: Any) -> Any:
        calls.append(1)
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * (1 + 0.3 * len(calls))}

    components.module.register_forward_pre_hook(drift, with_kwargs=True)
    return components


@pytest.mark.parametrize(
    "changes",
    [{"rollout": {"memory": "staged"}}, {"method": DRaFTLV(n=1)}, {"guards": Guards(anchor=0.1)}],
    ids=str,
)
def test_a_loop_that_cannot_be_replayed_is_refused_before_any_image_if_the_run_replays_it(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "evaluate", lambda *_: pytest.fail("images were sampled"))
    recipe = toy_world.recipe(tmp_path)
    rollout = replace(recipe.rollout, **changes.get("rollout", {}))
    recipe = replace(recipe, **{**changes, "rollout": rollout})
    with pytest.raises(SamplerError, match="gives another velocity than in its rollout"):
        train_command.main(recipe, drifting_world(recipe))


@pytest.mark.parametrize("memory", ["split", "retain"])
def test_a_loop_that_cannot_be_replayed_trains_if_the_run_does_not_replay_it(memory: Any, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    recipe = replace(recipe, rollout=replace(recipe.rollout, memory=memory))
    trial.check_gradient_is_finite(recipe, drifting_world(recipe), pytest.fail)


def test_settings_in_bfloat16_and_with_adapters_pass(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    check_reward(recipe, toy_world.world(recipe))
    low = replace(recipe, rollout=replace(recipe.rollout, precision="bfloat16"))
    assert lines_of(replace(low, train=replace(low.train, what="lora"))) == []
