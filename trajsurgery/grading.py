"""What grades a plan's outputs, and what takes its steps, where a method has something of its own: SRPO."""

from __future__ import annotations

import copy
from typing import Any

import torch

from trajsurgery.errors import RecipeError
from trajsurgery.methods.srpo import GUIDED
from trajsurgery.node import Velocity
from trajsurgery.params import Fields
from trajsurgery.pipelines import Surgery
from trajsurgery.plan import Plan
from trajsurgery.recipe import Recipe
from trajsurgery.reentry import PipelineField
from trajsurgery.scorers import Reward


def graders(recipe: Recipe, plan: Plan, reward: Reward, generator: torch.Generator) -> tuple[Reward, ...]:
    """The reward of each output: the recipe's, or what the method makes of it (`SRPO.graded`)."""
    own: Any = getattr(recipe.method, "graded", None)
    return tuple(reward for _ in plan.outputs) if own is None else own(plan, reward, generator)


def guided(plan: Plan) -> bool:
    """Whether a field with another guidance than the rollout's takes a step of the plan."""
    return any(isinstance(node, Velocity) and node.field == GUIDED for node in plan.nodes)


def rollout_guidance(recipe: Recipe) -> dict[str, float]:
    """The guidance of a rollout whose steps are taken with the recipe's own."""
    found: float | None = getattr(recipe.method, "rollout_guidance", None)
    return {} if found is None else {"guidance_scale": found}


def fields(recipe: Recipe, surgery: Surgery) -> Fields:
    """The rollout's field, and by the name GUIDED the same call's with the recipe's guidance.

    Raises:
        RecipeError: the pipeline's guidance is no input of its model.
    """
    pipe = surgery.field.record.pipe
    if not getattr(pipe.transformer.config, "guidance_embeds", False):
        raise RecipeError(
            f"--method.rollout-guidance: the guidance of {type(pipe).__name__} is no input of its model (or it has "
            "none), so that a rollout can't be entered again with another one. Leave it out: both have the recipe's."
        )
    record = copy.copy(surgery.field.record)
    record.arguments = {**record.arguments, "guidance_scale": recipe.rollout.guidance}
    return {None: surgery.field, GUIDED: PipelineField(record, surgery.trajectory)}
