"""SRPO's relative reward, its discounts and words, and its guidance, by hand and in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toy_world
from tests.tolerances import STOCK, VALUE
from trajsurgery import SRPO, PlanError, apply, operate, srpo
from trajsurgery.errors import RecipeError
from trajsurgery.grading import fields
from trajsurgery.methods.srpo import GUIDED, relative
from trajsurgery.recipe import Recipe

AUTHORS = SRPO(("Real", "Detail"), ("Flat", "Oil", "Anime"))


def letters(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A score that tells by its text how it was asked."""
    return images * torch.tensor([float(len(prompt)) for prompt in prompts])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_relative_reward_is_a_difference_of_two_prompts() -> None:
    images = torch.tensor([2.0, 3.0])
    found = relative(letters, "Real", "Flat paint", 0.25)(images, ["abc", "de"])
    wanted = [1.25 * 2 * len("Real. abc") - 2 * len("Flat paint. abc"), 1.25 * 3 * len("Real. de") - 3 * 14]
    assert found.tolist() == wanted
    assert relative(letters, "", "", 0.5)(images, ["abc", "de"]).tolist() == [0.5 * 6, 0.5 * 6]


def test_a_draw_has_the_step_down_and_the_step_up_that_land_together() -> None:
    """The authors' window is 0.9 T to 0.5 T, and both branches train the same time (SRPO.py, `mid_timestep`)."""
    generator, seen = seeded(0), Counter[int]()
    for _ in range(200):
        plan = AUTHORS.draw(25, generator)
        k, up = (output.x.x.t for output in plan.outputs)  # pyright: ignore[reportAttributeAccessIssue]
        m, too = (output.x.to for output in plan.outputs)  # pyright: ignore[reportAttributeAccessIssue]
        assert (m, k, up) == (too, m + 1, m - 1)
        seen[m] += 1
    assert set(seen) == set(range(13, 23))
    assert len(replace(AUTHORS, inversion=False).draw(25, generator).outputs) == 1
    assert len(SRPO().draw(25, generator).outputs) == 1


@pytest.mark.parametrize("m, share", [(13, 0.0), (17, 4 / 9), (22, 1.0)])
def test_discounts_are_linear_in_the_time_of_the_less_noisy_end(m: int, share: float) -> None:
    method = SRPO(("Real",), ("Flat",), discount=(0.1, 0.25), discount_inversion=(0.3, 0.01))
    plan = next(plan for seed in range(99) if (plan := method.draw(25, seeded(seed))).outputs[0].x.to == m)  # pyright: ignore[reportAttributeAccessIssue]
    down, up = method.graded(plan, letters)
    images, prompts = torch.ones(1), ["abc"]
    real, flat = 9.0, 9.0
    assert abs(float(down(images, prompts)) - ((1 + 0.1 + 0.15 * share) * real - flat)) < VALUE[torch.float32] * 10
    lower = max(0.0, share - 1 / 9)
    assert abs(float(up(images, prompts)) - ((1 + 0.3 - 0.29 * lower) * flat - real)) < VALUE[torch.float32] * 10


def test_the_inversion_asks_for_what_is_not_wanted_and_words_are_drawn() -> None:
    asked: list[list[str]] = []

    def notes(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked.append([prompt.partition(".")[0] for prompt in prompts])
        return images

    generator, down, up = seeded(0), Counter[str](), Counter[str]()
    plan = AUTHORS.draw(25, generator)
    for _ in range(60):
        asked.clear()
        for grade in AUTHORS.graded(plan, notes, generator):
            grade(torch.ones(1), ["a"])
        (wanted,), (unwanted,), (first,), (second,) = asked
        assert (first, second) == (unwanted, wanted)
        down[wanted] += 1
        up[first] += 1
    assert set(down) == {"Real", "Detail"}
    assert set(up) == {"Flat", "Oil", "Anime"}


def test_without_words_the_reward_is_the_recipe_s() -> None:
    plan = SRPO().draw(25, seeded(0))
    assert SRPO().graded(plan, letters) == (letters,)


@pytest.mark.parametrize("wrong", [SRPO(step=0), SRPO(window=(0.96, 1.0)), SRPO(discount=(float("nan"), 0.0))])
def test_what_makes_no_plan(wrong: SRPO) -> None:
    with pytest.raises(PlanError, match="SRPO"):
        wrong.draw(25)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return toy_world.world(Recipe()).pipe


CALL = {"prompt": ["a circle"], "height": 16, "width": 16, "num_inference_steps": 5, "output_type": "latent"}


def test_the_guided_field_is_the_same_call_s_with_another_guidance(pipe: Any) -> None:
    """At the noise it gives, and trains by, the velocity of a plain call with that guidance."""
    recipe = replace(Recipe(), rollout=replace(Recipe().rollout, guidance=3.5))
    with operate(pipe) as low:
        pipe(**CALL, guidance_scale=1.0, generator=seeded(4))
    with operate(pipe) as high:
        pipe(**CALL, guidance_scale=3.5, generator=seeded(4))
    both: Any = fields(recipe, low)
    x, eps = low.trajectory[0], low.trajectory[5]
    assert not torch.equal(x, high.trajectory[0])
    s4, s3 = low.trajectory.sigma(4), low.trajectory.sigma(3)
    noisy = (1 - s4) * x + s4 * eps
    grads = []
    for fresh in (both[GUIDED], high.field):
        image = (noisy + (s3 - s4) * fresh(noisy, s4) - s3 * eps) / (1 - s3)
        grads.append(torch.autograd.grad(image.square().sum(), list(pipe.transformer.parameters()), allow_unused=True))
    plan = srpo(4, 3, GUIDED)
    out = apply(plan, low.trajectory, both)
    grads.append(torch.autograd.grad(out.square().sum(), list(pipe.transformer.parameters()), allow_unused=True))
    sizes = [torch.cat([g.flatten() for g in found if g is not None]) for found in grads]
    assert sizes[0].norm() > 0
    assert torch.equal(sizes[0], sizes[1])
    assert (sizes[2] - sizes[0]).norm() <= STOCK * 10 * sizes[0].norm()  # float32, in another order


def test_a_guidance_that_is_no_input_is_refused(pipe: Any) -> None:
    with operate(pipe) as surgery:
        pipe(**CALL, generator=seeded(4))
    pipe.transformer.register_to_config(guidance_embeds=False)
    try:
        with pytest.raises(RecipeError, match=r"--method\.rollout-guidance"):
            fields(Recipe(), surgery)
    finally:
        pipe.transformer.register_to_config(guidance_embeds=True)
