"""What grades a plan's outputs, and what takes its steps, where a method has something of its own: SRPO."""

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
from trajsurgery.rewards.by_name import Reward
from trajsurgery.surgery.parameters import Fields
from trajsurgery.training.recipe import Recipe


def graders(recipe: Recipe, plan: Plan | PerSample, reward: Reward, generator: torch.Generator) -> tuple[Reward, ...]:
    """The reward of each output: the recipe's, or what the method makes of it (`SRPO.graded`)."""
    own: Any = getattr(recipe.method, "graded", None)
    if own is None:
        return (reward,) * len(plan.plans[0].outputs if isinstance(plan, PerSample) else plan.outputs)
    if isinstance(plan, Plan):
        return own(plan, reward, generator)
    return tuple(map(_each, zip(*(own(one, reward, generator) for one in plan.plans), strict=True)))


def _each(grades: Sequence[Reward]) -> Reward:
    """One reward for a batch whose samples have each their own."""

    def graded(images: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = zip(grades, images.split(1), prompts, strict=True)
        return torch.cat([grade(image, [prompt]) for grade, image, prompt in parts])

    return graded


def guided(plan: Plan | PerSample) -> bool:
    """Whether a field with another guidance than the rollout's takes a step of the plan."""
    return any(isinstance(node, Velocity) and node.field == GUIDED for node in plan.nodes)


def rollout_guidance(recipe: Recipe) -> dict[str, float]:
    """The guidance of a rollout whose steps are taken with the recipe's own."""
    found: float | None = getattr(recipe.method, "rollout_guidance", None)
    return {} if found is None else {"guidance_scale": found}


def steerable(recipe: Recipe, transformer: nn.Module) -> None:
    """Stops a recipe whose rollout has another guidance than its step on a model that is not told its guidance.

    Raises:
        RecipeError: guidance is no input of the model.
    """
    if rollout_guidance(recipe) and not getattr(transformer.config, "guidance_embeds", False):
        raise RecipeError(
            f"--method.rollout-guidance {rollout_guidance(recipe)['guidance_scale']}: guidance is no input of "
            f"{recipe.model}'s {type(transformer).__name__}, so that its rollout can't be entered again with another "
            "one. Say --method.rollout-guidance None: rollout and step both have --rollout.guidance."
        )


def fields(recipe: Recipe, plan: Plan | PerSample, surgery: Surgery) -> Fields:
    """The rollout's field; beside it, under GUIDED, the same call's with the recipe's guidance if the plan asks."""
    if not guided(plan):
        return surgery.field
    record = copy.copy(surgery.field.record)
    record.arguments = {**record.arguments, "guidance_scale": recipe.rollout.guidance}
    return {None: surgery.field, GUIDED: PipelineField(record, surgery.trajectory)}
