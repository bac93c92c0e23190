"""SRPO: reward pairs and guided velocity for a plan's outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RecipeError
from trajsurgery.methods.srpo import GUIDED
from trajsurgery.pipelines.operate import Surgery
from trajsurgery.pipelines.pipeline_field import PipelineField
from trajsurgery.plans.nodes import Velocity
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.rewards.loading import Reward
from trajsurgery.surgery.parameters import Fields
from trajsurgery.training.recipe import Recipe


def output_rewards(
    recipe: Recipe, plan: Plan | PerSample, reward: Reward, seed: int, sample_seeds: Sequence[int]
) -> tuple[Reward, ...]:
    """Return the reward of each output: the recipe's, or what the method makes of it (`SRPO.graded`).

    Args:
        seed: seed of what the method draws for a plan that all samples share.
        sample_seeds: seeds of what it draws for each sample's plan.
    """
    make_rewards: Any = getattr(recipe.method, "graded", None)
    if make_rewards is None:
        return (reward,) * len(plan.plans[0].outputs if isinstance(plan, PerSample) else plan.outputs)
    if isinstance(plan, Plan):
        return make_rewards(plan, reward, torch.Generator().manual_seed(seed))
    of_samples = [
        make_rewards(one, reward, torch.Generator().manual_seed(sample_seed))
        for one, sample_seed in zip(plan.plans, sample_seeds, strict=True)
    ]
    return tuple(map(_reward_per_sample, zip(*of_samples, strict=True)))


def _reward_per_sample(rewards: Sequence[Reward]) -> Reward:
    """Return one reward for a batch whose samples have a reward each."""

    def scored(images: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = zip(rewards, images.split(1), prompts, strict=True)
        return torch.cat([reward(image, [prompt]) for reward, image, prompt in parts])

    return scored


def needs_guided_field(plan: Plan | PerSample) -> bool:
    """Return whether a step of the plan uses another guidance scale than the rollout."""
    return any(isinstance(node, Velocity) and node.field == GUIDED for node in plan.nodes)


def rollout_guidance(recipe: Recipe) -> dict[str, float]:
    """Return the rollout's guidance arguments, where the method sets its own."""
    scale: float | None = getattr(recipe.method, "rollout_guidance", None)
    return {} if scale is None else {"guidance_scale": scale}


def check_guidance_is_input(recipe: Recipe, transformer: nn.Module) -> None:
    """Raise if the rollout and the gradient step use different guidance scales on a model without guidance as input.

    Raises:
        RecipeError: guidance is no input of the model.
    """
    if rollout_guidance(recipe) and not getattr(transformer.config, "guidance_embeds", False):
        raise RecipeError(
            f"--method.rollout-guidance {rollout_guidance(recipe)['guidance_scale']}: guidance is no input of "
            f"{recipe.model}'s {type(transformer).__name__}, so that its rollout can't be entered again with another "
            "one. Say --method.rollout-guidance None: rollout and step both have --rollout.guidance."
        )


def velocity_fields(recipe: Recipe, plan: Plan | PerSample, surgery: Surgery) -> Fields:
    """Return the rollout's field and, if the plan needs it, the same field with the recipe's guidance."""
    if not needs_guided_field(plan):
        return surgery.field
    record = copy.copy(surgery.field.record)
    record.arguments = {**record.arguments, "guidance_scale": recipe.rollout.guidance}
    return {None: surgery.field, GUIDED: PipelineField(record, surgery.trajectory)}
