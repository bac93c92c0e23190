"""The gradient of one rollout: sample images, score them, and backpropagate the loss along the plan into `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajsurgery.pipelines.operate import Surgery, operate
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.api import apply, backward, distances, values
from trajsurgery.surgery.parameters import Fields
from trajsurgery.training import objective, srpo_support
from trajsurgery.training.components import RunComponents, pipeline_arguments
from trajsurgery.training.faults.bad_numbers import first_not_finite
from trajsurgery.training.iteration_parts import part
from trajsurgery.training.recipe import Recipe

ExtraGradient = Callable[[Surgery, float], Tensor]
"""extra(surgery, share): add `share` of another gradient to `.grad` and return a 0-dim figure (anchor.py)."""


@dataclass(frozen=True)
class RolloutInputs:
    """The samples of one rollout, a part of the iteration's batch."""

    texts: list[str]
    arguments: dict[str, Any]
    """Of the pipeline's call: encoded prompts, and a generator for each sample's noise."""
    renoise: Sequence[torch.Generator]
    """A generator for each sample, for the noises that its plan draws; its seed is that of the plan's words."""
    seed: int
    """The same for all rollouts of an iteration: seed of what a method draws beside a shared plan (SRPO's words)."""
    share: float
    """Of the iteration's batch."""
    keep: frozenset[int] | None = None
    """The times whose latents and velocities the rollout keeps; None: all."""


def draw_plans(recipe: Recipe, generator: torch.Generator) -> list[Plan | PerSample]:
    """Draw the plans of an iteration: `rollout.plans` of them, each for the whole batch or one for each sample."""
    rollout, method = recipe.rollout, recipe.method
    if rollout.times == "shared":
        return [method.draw(rollout.steps, generator) for _ in range(rollout.plans)]
    batch = range(rollout.batch)
    return [PerSample(method.draw(rollout.steps, generator) for _ in batch) for _ in range(rollout.plans)]


def times_of_plans(plans: Sequence[Plan | PerSample]) -> frozenset[int]:
    """Return the times of the plans' nodes: what they read of a rollout."""
    return frozenset(node.t for plan in plans for node in plan.nodes if isinstance(node.t, int))


def plan_of_samples(plan: Plan | PerSample, start: int, end: int) -> Plan | PerSample:
    """Return the plan of samples `start` to `end` of the batch."""
    return PerSample(plan.plans[start:end]) if isinstance(plan, PerSample) else plan


def add_gradient(
    recipe: Recipe,
    world: RunComponents,
    plan: Plan | PerSample,
    inputs: RolloutInputs,
    lambda_: float,
    hold: ExtraGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one batch and add its gradient to `.grad`.

    The graph of decoder and reward is run and freed before the transformer's backward pass begins.

    Args:
        lambda_: of the hinge.
        hold: adds a further gradient, such as the anchor's.

    Returns:
        [7]: reward, loss, clamped share, weight, closed share, distance, the figure of `hold`; and for each sample the
            place of its first number that is not finite (`bad_numbers.first_not_finite`).
    """
    texts, renoise, share = inputs.texts, inputs.renoise, inputs.share
    with part("the rollout"):
        images, outputs, leap_distances, surgery, fields = _sample(recipe, world, plan, inputs)
        decoded = [images, *(surgery.decode(x) for x in outputs[1:])]
    sample_seeds = [generator.initial_seed() for generator in renoise]
    rewards = srpo_support.output_rewards(recipe, plan, world.reward, inputs.seed, sample_seeds)
    with part("the reward"):
        scores = [grade(_without_nan(image), texts) for image, grade in zip(decoded, rewards, strict=True)]
    weights = objective.weights(plan, surgery.trajectory, leap_distances, recipe.weights_at, recipe.objective.tau)
    loss = objective.loss(scores, weights.w, lambda_)
    with part("the gradient of reward and decoder"):
        cotangents = objective.cotangents(loss * share, outputs)
    with part("the gradient sweep"):
        if recipe.rollout.memory == "staged":
            backward(plan, surgery.trajectory, fields, cotangents, generator=renoise, check=False)
        else:
            torch.autograd.backward(outputs, cotangents)
        extra = hold(surgery, share) if hold else loss.detach() * 0
    with torch.no_grad(), part("the reward"):
        reward = scores[0] if plan.exact else world.reward(_without_nan(surgery.decode(surgery.trajectory[0])), texts)
        bad = first_not_finite(surgery.trajectory, (outputs, decoded, (*scores, reward), cotangents))
        closed = (torch.stack([score.detach() for score in scores]) >= lambda_).float().mean()
        figures = reward.mean(), loss.detach(), weights.clamped, weights.w.mean(), closed, weights.distance, extra
        return torch.stack(figures).float(), bad


def add_shared_gradient(
    recipe: Recipe,
    world: RunComponents,
    plans: Sequence[Plan | PerSample],
    inputs: RolloutInputs,
    lambda_: float,
    hold: ExtraGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """As `add_gradient`, for several exact plans on one rollout, which share one decode and one reward gradient.

    All of them output the rollout's x_0. The loss is the mean over plans, each with its own similarity weights.
    """
    texts, renoise, share = inputs.texts, inputs.renoise, inputs.share
    with part("the rollout"), operate(world.pipe, keep=inputs.keep) as surgery:
        call = {"num_inference_steps": recipe.rollout.steps, **pipeline_arguments(recipe), **inputs.arguments}
        world.pipe(**call, output_type="latent")
    x_0, tail = surgery.trajectory[0].detach().requires_grad_(), (surgery.trajectory, surgery.field)
    image = surgery.decode(x_0)
    with part("the reward"):
        score = world.reward(_without_nan(image), texts)
    loss = objective.loss([score], torch.ones_like(score), lambda_)
    with part("the gradient of reward and decoder"):
        (unweighted,) = objective.cotangents(loss * share / len(plans), (x_0,))
    weights_of_plans: list[objective.Weights] = []
    for plan in plans:
        leap_distances = distances(plan, *tail, generator=renoise) if recipe.weights_at != "none" else {}
        weights_of_plans.append(
            objective.weights(plan, surgery.trajectory, leap_distances, recipe.weights_at, recipe.objective.tau)
        )
        cotangent = unweighted * weights_of_plans[-1].w.to(unweighted).view(-1, *[1] * (unweighted.dim() - 1))
        with part("the gradient sweep"):
            if recipe.rollout.memory == "staged":
                backward(plan, *tail, cotangent, generator=renoise, check=False)
            else:
                torch.autograd.backward(apply(plan, *tail, recipe.rollout.memory, generator=renoise), cotangent)
    with part("the gradient sweep"):
        extra = hold(surgery, share) if hold else loss.detach() * 0
    with torch.no_grad():
        w = torch.stack([weights.w for weights in weights_of_plans]).mean(0)
        clamped = torch.stack([weights.clamped for weights in weights_of_plans]).mean()
        distance = torch.stack([weights.distance for weights in weights_of_plans]).mean()
        loss = objective.loss([score], w, lambda_)
        bad = first_not_finite(surgery.trajectory, ((x_0,), (image,), (score,), (unweighted,)))
        closed = (score >= lambda_).float().mean()
        return torch.stack([score.mean(), loss, clamped, w.mean(), closed, distance, extra]).float(), bad


def _sample(
    recipe: Recipe, world: RunComponents, plan: Plan | PerSample, inputs: RolloutInputs
) -> tuple[Tensor, tuple[Tensor, ...], dict[int, Tensor], Surgery, Fields]:
    """Run the pipeline; return (images of the plan's first output, all outputs, leap distances, surgery, fields)."""
    rollout, memory, renoise = recipe.rollout, recipe.rollout.memory, inputs.renoise
    call = {
        "num_inference_steps": rollout.steps,
        **pipeline_arguments(recipe),
        **inputs.arguments,
        **srpo_support.rollout_guidance(recipe),
    }
    if memory != "staged" and isinstance(plan, Plan) and not srpo_support.needs_guided_field(plan):
        with operate(world.pipe, plan, memory=memory, generator=renoise, keep=inputs.keep) as surgery:
            images = world.pipe(**call, output_type="pt")[0]
        return images, surgery.outputs, surgery.distances, surgery, surgery.field
    with operate(world.pipe, keep=inputs.keep) as surgery:
        world.pipe(**call, output_type="latent")
    run = surgery.trajectory, srpo_support.velocity_fields(recipe, plan, surgery)
    if memory == "staged":
        outputs_of_plan = values(plan, *run, generator=renoise)
    else:
        outputs_of_plan = apply(plan, *run, memory, generator=renoise)
    outputs = (outputs_of_plan,) if isinstance(outputs_of_plan, Tensor) else outputs_of_plan
    if memory == "staged":
        outputs = tuple(x.detach().requires_grad_() for x in outputs)
    leap_distances = distances(plan, *run, generator=renoise) if recipe.weights_at != "none" else {}
    return surgery.decode(outputs[0]), outputs, leap_distances, surgery, run[1]


def _without_nan(images: Tensor) -> Tensor:
    """Replace NaN by grey: a reward may refuse NaN, and the step is skipped anyway."""
    return torch.nan_to_num(images, nan=0.5, posinf=1.0, neginf=0.0)
