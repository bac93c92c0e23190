"""SRPO's relative reward, its discounts and words, and its guidance, against formulas and in training."""

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
from tests.tolerances import STOCK, VALUE
from trajsurgery import SRPO, PerSample, PlanError, apply, operate, srpo
from trajsurgery.cli.train_command import main
from trajsurgery.errors import RecipeError
from trajsurgery.methods.srpo import GUIDED, relative
from trajsurgery.training.components import PromptCache
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.srpo_support import velocity_fields
from trajsurgery.training.step_gradient import RolloutInputs, add_gradient, draw_plans, plan_of_samples

AUTHORS = SRPO(("Real", "Detail"), ("Flat", "Oil", "Anime"))


def letters(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A score that depends on the length of the prompt."""
    return images * torch.tensor([float(len(prompt)) for prompt in prompts])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_relative_reward_is_a_difference_of_two_prompts() -> None:
    images = torch.tensor([2.0, 3.0])
    scores = relative(letters, "Real", "Flat paint", 0.25)(images, ["abc", "de"])
    expected = [1.25 * 2 * len("Real. abc") - 2 * len("Flat paint. abc"), 1.25 * 3 * len("Real. de") - 3 * 14]
    assert scores.tolist() == expected
    assert relative(letters, "", "", 0.5)(images, ["abc", "de"]).tolist() == [0.5 * 6, 0.5 * 6]


def test_a_draw_has_a_step_down_and_a_step_up_to_the_same_time() -> None:
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


def test_the_inversion_swaps_the_words_and_words_are_drawn() -> None:
    words: list[list[str]] = []

    def record(images: Tensor, prompts: Sequence[str]) -> Tensor:
        words.append([prompt.partition(".")[0] for prompt in prompts])
        return images

    generator, down, up = seeded(0), Counter[str](), Counter[str]()
    plan = AUTHORS.draw(25, generator)
    for _ in range(60):
        words.clear()
        for grade in AUTHORS.graded(plan, record, generator):
            grade(torch.ones(1), ["a"])
        (positive,), (negative,), (first,), (second,) = words
        assert (first, second) == (negative, positive)
        down[positive] += 1
        up[first] += 1
    assert set(down) == {"Real", "Detail"}
    assert set(up) == {"Flat", "Oil", "Anime"}


def test_without_words_the_reward_is_the_recipe_s() -> None:
    plan = SRPO().draw(25, seeded(0))
    assert SRPO().graded(plan, letters) == (letters,)


@pytest.mark.parametrize("wrong", [SRPO(step=0), SRPO(window=(0.96, 1.0)), SRPO(discount=(float("nan"), 0.0))])
def test_invalid_settings_are_refused(wrong: SRPO) -> None:
    with pytest.raises(PlanError, match="SRPO"):
        wrong.draw(25)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return toy_world.world(Recipe()).pipe


CALL = {"prompt": ["a circle"], "height": 16, "width": 16, "num_inference_steps": 5, "output_type": "latent"}


def test_the_guided_field_is_that_of_a_call_with_another_guidance(pipe: Any) -> None:
    """On renoised latents its velocity and gradient are those of a plain call with that guidance."""
    recipe = replace(Recipe(), rollout=replace(Recipe().rollout, guidance=3.5))
    plan, weights = srpo(4, 3, GUIDED), list(pipe.transformer.parameters())
    with operate(pipe) as low:
        pipe(**CALL, guidance_scale=1.0, generator=seeded(4))
    with operate(pipe) as high:
        pipe(**CALL, guidance_scale=3.5, generator=seeded(4))
    both: Any = velocity_fields(recipe, plan, low)
    x, eps = low.trajectory[0], low.trajectory[5]
    assert not torch.equal(x, high.trajectory[0])
    s4, s3 = low.trajectory.sigma(4), low.trajectory.sigma(3)
    noisy = (1 - s4) * x + s4 * eps
    images = [
        (noisy + (s3 - s4) * fresh(noisy, s4) - s3 * eps) / (1 - s3) for fresh in (both[GUIDED], high.field, low.field)
    ]
    images.append(apply(plan, low.trajectory, both))
    grads = [torch.autograd.grad(image.square().sum(), weights, allow_unused=True) for image in images]
    guided, plain, unguided, ours = (torch.cat([g.flatten() for g in gradient if g is not None]) for gradient in grads)
    assert torch.equal(guided, plain)
    assert (unguided - plain).norm() > 0.01 * plain.norm()
    assert (ours - plain).norm() <= STOCK * 10 * plain.norm()  # float32, in another order


def test_a_plan_without_a_named_field_uses_the_rollout_s_field(pipe: Any) -> None:
    with operate(pipe) as surgery:
        pipe(**CALL, generator=seeded(4))
    assert velocity_fields(Recipe(), srpo(4, 3), surgery) is surgery.field


METHOD = replace(AUTHORS, window=(0.0, 1.0), rollout_guidance=1.0)
SHARED, SAMPLES = 3, (1, 4)
"""Seeds of the words: of a plan that all samples share, and of each sample's plan. Each draws other words."""


def short(tmp_path: Path, memory: Any = "retain", **changes: Any) -> Recipe:
    recipe = toy_world.recipe(tmp_path)
    return replace(recipe, method=METHOD, rollout=replace(recipe.rollout, memory=memory, guidance=3.5, **changes))


@pytest.mark.parametrize("times", ["shared", "per-sample"])
def test_training_uses_the_relative_reward_s_gradient(tmp_path: Path, times: Any) -> None:
    """Against the same iteration written as a loop: rollout at guidance 1, noise, one step at 3.5, recovery, loss."""
    recipe = short(tmp_path, times=times)
    world = toy_world.world(recipe)
    weights = list(world.module.parameters())
    drawn = (plan_of_samples(draw_plans(recipe, seeded(number))[0], 0, 2) for number in range(1, 50))
    plan = next(p for p in drawn if not isinstance(p, PerSample) or len(set(p.plans)) == 2)  # times of their own
    texts, cache = ["a circle", "two squares"], PromptCache(world.pipe, toy_world.TEXTS)
    each = plan.plans if isinstance(plan, PerSample) else (plan, plan)
    by_memory = {}
    for memory in ("retain", "recompute", "staged"):
        for weight in weights:
            weight.grad = None
        variant = replace(recipe, rollout=replace(recipe.rollout, memory=memory))
        inputs = RolloutInputs(texts, {**cache(texts), "generator": seeded(2)}, list(map(seeded, SAMPLES)), SHARED, 1.0)
        scores, _ = add_gradient(variant, world, plan, inputs, 0.7)
        assert bool(scores.isfinite().all())
        by_memory[memory] = [p.grad for p in weights]
    expected = by_hand(recipe, world, each, texts, {**cache(texts), "generator": seeded(2)}, times == "per-sample")
    for memory, got in by_memory.items():
        for a, b in zip(got, expected, strict=True):
            assert (a is None or not a.any()) if b is None else a is not None, memory
        apart = [(a - b).norm() for a, b in zip(got, expected, strict=True) if a is not None and b is not None]
        size = torch.stack([b.norm() for b in expected if b is not None]).norm()
        assert size > 0
        assert torch.stack(apart).norm() <= VALUE[torch.float32] * 10 * size, memory


def by_hand(recipe: Recipe, world: Any, plans: Any, texts: Any, inputs: Any, apart: bool) -> list[Tensor | None]:
    """The gradient written as a loop over images; `apart` draws words for each image."""
    steps = recipe.rollout.steps
    call = {"num_inference_steps": steps, "height": recipe.rollout.size, "width": recipe.rollout.size, **inputs}
    with operate(world.pipe) as low:
        world.pipe(**call, guidance_scale=1.0, output_type="latent")
    with operate(world.pipe) as high:
        world.pipe(**{**call, "generator": seeded(2)}, guidance_scale=3.5, output_type="latent")
    words = [pair for _, pair in _drawn(plans, apart)]
    x, eps, total = low.trajectory[0], low.trajectory[steps], torch.zeros(())
    for i, plan in enumerate(plans):
        for output in plan.outputs:
            k, j = output.x.x.t, output.x.to
            s_k, s_j = low.trajectory.sigma(k), low.trajectory.sigma(j)
            noisy = (1 - s_k) * x + s_k * eps
            image = high.field.decode((noisy + (s_j - s_k) * high.field(noisy, s_k) - s_j * eps) / (1 - s_j))
            share = (min(k, j) - 1) / (steps - 1)
            (a, b), (positive, negative) = ((0.1, 0.25), words[i]) if j < k else ((0.3, 0.01), words[i][::-1])
            prompts = [[f"{word}. {text}" for text in texts] for word in (positive, negative)]
            score = (1 + a + (b - a) * share) * world.reward(image, prompts[0]) - world.reward(image, prompts[1])
            total = total + (0.7 - score).clamp(min=0)[i] / len(texts)
    return list(torch.autograd.grad(total, list(world.module.parameters()), allow_unused=True))


def _drawn(plans: Any, apart: bool) -> list[tuple[Any, tuple[str, str]]]:
    """The words that are drawn for each sample: with its seed, or with one seed for all."""
    pairs = []
    for seed in SAMPLES if apart else [SHARED] * len(SAMPLES):
        generator = seeded(seed)
        positive = METHOD.positive[int(torch.randint(2, (), generator=generator))]
        pairs.append((positive, METHOD.negative[int(torch.randint(3, (), generator=generator))]))
    return list(zip(plans, pairs, strict=True))


def test_a_guidance_that_is_no_input_is_refused_before_the_first_image(tmp_path: Path) -> None:
    recipe = short(tmp_path)
    world = toy_world.world(recipe)
    world.module.register_to_config(guidance_embeds=False)  # pyright: ignore[reportCallIssue]
    with pytest.raises(RecipeError, match=r"--method\.rollout-guidance"):
        main(recipe, world)
    assert not (tmp_path / "checkpoints").exists()
