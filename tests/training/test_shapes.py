"""Non-square images, batches, several images a prompt: under `operate` and in a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import toy_world
from tests.builders.small_pipelines import PIPELINES, Small
from tests.pipelines.test_operate import gap
from tests.tolerances import STOCK
from trajsurgery import RecipeError, apply, backward, leapalign, operate, tiny
from trajsurgery.cli import train_command
from trajsurgery.training.recipe import Recipe

PLAN = leapalign(5, 2, 0.3)


def embedded(name: str) -> Small:
    """A tiny pipeline in float64 with prompts of different lengths, two images of each."""
    pipe = tiny.pipeline(name).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 6, "guidance_scale": 3.5, "output_type": "pt"}
    return Small(pipe, {"prompt": ["a circle", "a red circle left of a blue square"], **call})


BUILT = {**PIPELINES, "embedded flux": lambda _: embedded("flux"), "embedded sd3": lambda _: embedded("sd3")}
SHAPES = {"flux": {"height": 16, "width": 24}, "sd3": {"height": 24, "width": 16}}


@pytest.mark.parametrize("name", BUILT)
def test_operate_agrees_in_every_way_of_running(name: str) -> None:
    torch.set_num_threads(1)
    small = BUILT[name](torch.float64)
    shape = SHAPES.get(name, {"num_images_per_prompt": 2})
    params = list(small.pipe.transformer.parameters())
    plain = small(**shape).images
    size = (shape.get(side, 32) for side in ("height", "width"))
    assert plain.shape == (2 * shape.get("num_images_per_prompt", 1), 3, *size)
    with operate(small.pipe, PLAN) as surgery:
        images = small(**shape).images
    assert torch.equal(images, plain)
    (output,) = surgery.outputs
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))

    def with_zeros(gradients: Sequence[Tensor | None]) -> list[Tensor]:
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)]

    expected = with_zeros(torch.autograd.grad(output, params, cotangent, retain_graph=True, allow_unused=True))
    assert gap(PLAN.gradient().evaluate(surgery.trajectory, surgery.field, cotangent), expected) < STOCK
    recomputed = apply(PLAN, surgery.trajectory, surgery.field, memory="recompute")
    assert isinstance(recomputed, Tensor)
    assert gap(with_zeros(torch.autograd.grad(recomputed, params, cotangent, allow_unused=True)), expected) < STOCK
    small.pipe.transformer.zero_grad(set_to_none=True)
    backward(PLAN, surgery.trajectory, surgery.field, cotangent)
    assert gap(with_zeros([p.grad for p in params]), expected) < STOCK


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged", "split"])
def test_a_run_with_wide_images_and_several_a_prompt(memory: Any, tmp_path: Path) -> None:
    recipe: Recipe = toy_world.recipe(tmp_path, iterations=1)
    recipe = replace(recipe, rollout=replace(recipe.rollout, width=24, per_prompt=2, memory=memory))
    world, batches = toy_world.world(recipe), list[tuple[tuple[int, ...], list[int]]]()

    class RecordingReward(toy_world.LikesRed):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            batches.append((tuple(images.shape[-2:]), sorted(Counter(prompts).values())))
            return super().__call__(images, prompts)

    assert train_command.main(recipe, replace(world, reward=RecordingReward())) is not None
    assert {size for size, _ in batches} == {(16, 24)}
    training = [counts for _, counts in batches if sum(counts) == 4 and all(count % 2 == 0 for count in counts)]
    assert training
    assert (tmp_path / "samples.png").is_file()


def test_images_per_prompt_must_divide_the_batch(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="per_prompt"):
        toy_world.recipe(tmp_path, rollout=replace(toy_world.recipe(tmp_path).rollout, per_prompt=3))
