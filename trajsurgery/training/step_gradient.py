"""One iteration's gradient: a rollout, its grades, and what they pull along the plan into `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trajsurgery.pipelines.operate import Surgery, operate
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.api import apply, backward, distances, values
from trajsurgery.surgery.parameters import Fields
from trajsurgery.training import objective, srpo_support
from trajsurgery.training.components import RunComponents, call_of
from trajsurgery.training.recipe import Recipe

Hold = Callable[[Surgery, float], Tensor]
"""hold(surgery, share): adds share of a gradient of its own into `.grad` and returns a figure, 0-dim (anchor.py)."""


def draw_plans(recipe: Recipe, generator: torch.Generator) -> list[Plan | PerSample]:
    """An iteration's plans: as many as are asked for on a rollout, each one for all samples or one for each."""
    rollout, method = recipe.rollout, recipe.method
    if rollout.times == "shared":
        return [method.draw(rollout.steps, generator) for _ in range(rollout.plans)]
    batch = range(rollout.batch)
    return [PerSample(method.draw(rollout.steps, generator) for _ in batch) for _ in range(rollout.plans)]


def part_of(plan: Plan | PerSample, start: int, end: int) -> Plan | PerSample:
    """The plan of these samples of the batch."""
    return PerSample(plan.plans[start:end]) if isinstance(plan, PerSample) else plan


def pull(
    recipe: Recipe,
    world: RunComponents,
    plan: Plan | PerSample,
    texts: list[str],
    kwargs: dict[str, Any],
    renoise: torch.Generator,
    scale: tuple[float, float],
    hold: Hold | None = None,
) -> Tensor:
    """One rollout and its gradient, added into `.grad`.

    Returns [7]: reward, loss, clamped, weight, closed, health (0 or NaN), what `hold` says (0 without one).

    The graph of decoder and reward is run and freed before the transformer's backward pass begins.
    """
    lambda_, share = scale
    images, outputs, found, surgery, fields = _sample(recipe, world, plan, kwargs, renoise)
    decoded = [images, *(surgery.decode(x) for x in outputs[1:])]
    graders = srpo_support.graders(recipe, plan, world.reward, renoise)
    scores = [grade(_whole(image), texts) for image, grade in zip(decoded, graders, strict=True)]
    weights = objective.weights(plan, surgery.trajectory, found, recipe.weights_at, recipe.objective.tau)
    loss = objective.loss(scores, weights.w, lambda_)
    cotangents = objective.cotangents(loss * share, outputs)
    if recipe.rollout.memory == "staged":
        backward(plan, surgery.trajectory, fields, cotangents, generator=renoise, check=False)
    else:
        torch.autograd.backward(outputs, cotangents)
    held = hold(surgery, share) if hold else loss.detach() * 0
    with torch.no_grad():
        reward = scores[0] if plan.exact else world.reward(_whole(surgery.decode(surgery.trajectory[0])), texts)
        health = sum((image.detach().sum() * 0 for image in decoded), loss.detach() * 0)
        closed = (torch.stack([score.detach() for score in scores]) >= lambda_).float().mean()
        grades = reward.mean(), loss.detach(), weights.clamped, weights.w.mean(), closed, health, held
        return torch.stack(grades).float()


def pull_several(
    recipe: Recipe,
    world: RunComponents,
    plans: Sequence[Plan | PerSample],
    texts: list[str],
    kwargs: dict[str, Any],
    renoise: torch.Generator,
    scale: tuple[float, float],
    hold: Hold | None = None,
) -> Tensor:
    """As `pull`, for several exact plans: their output is the rollout's x_0, hence one decode and one reward gradient.

    The loss is their mean, each with weights of its own.
    """
    lambda_, share = scale
    with operate(world.pipe) as surgery:
        world.pipe(num_inference_steps=recipe.rollout.steps, **call_of(recipe), **kwargs, output_type="latent")
    x_0, tail = surgery.trajectory[0].detach().requires_grad_(), (surgery.trajectory, surgery.field)
    image = surgery.decode(x_0)
    score = world.reward(_whole(image), texts)
    loss = objective.loss([score], torch.ones_like(score), lambda_)
    (unweighted,) = objective.cotangents(loss * share / len(plans), (x_0,))
    found: list[objective.Weights] = []
    for plan in plans:
        apart = distances(plan, *tail, generator=renoise) if recipe.weights_at != "none" else {}
        found.append(objective.weights(plan, surgery.trajectory, apart, recipe.weights_at, recipe.objective.tau))
        cotangent = unweighted * found[-1].w.to(unweighted).view(-1, *[1] * (unweighted.dim() - 1))
        if recipe.rollout.memory == "staged":
            backward(plan, *tail, cotangent, generator=renoise, check=False)
        else:
            torch.autograd.backward(apply(plan, *tail, recipe.rollout.memory, generator=renoise), cotangent)
    held = hold(surgery, share) if hold else loss.detach() * 0
    with torch.no_grad():
        w = torch.stack([weights.w for weights in found]).mean(0)
        clamped = torch.stack([weights.clamped for weights in found]).mean()
        loss = objective.loss([score], w, lambda_)
        health = image.detach().sum() * 0 + loss * 0
        closed = (score >= lambda_).float().mean()
        return torch.stack([score.mean(), loss, clamped, w.mean(), closed, health, held]).float()


def _sample(
    recipe: Recipe, world: RunComponents, plan: Plan | PerSample, kwargs: dict[str, Any], renoise: torch.Generator
) -> tuple[Tensor, tuple[Tensor, ...], dict[int, Tensor], Surgery, Fields]:
    """A rollout through the pipe: images of the plan's first output, all outputs, its leaps' distances, the surgery."""
    rollout, memory = recipe.rollout, recipe.rollout.memory
    call = {"num_inference_steps": rollout.steps, **call_of(recipe), **kwargs, **srpo_support.rollout_guidance(recipe)}
    if memory != "staged" and isinstance(plan, Plan) and not srpo_support.guided(plan):
        with operate(world.pipe, plan, memory=memory, generator=renoise) as surgery:
            images = world.pipe(**call, output_type="pt")[0]
        return images, surgery.outputs, surgery.distances, surgery, surgery.field
    with operate(world.pipe) as surgery:
        world.pipe(**call, output_type="latent")
    tail = surgery.trajectory, srpo_support.fields(recipe, plan, surgery)
    if memory == "staged":
        found = values(plan, *tail, generator=renoise)
    else:
        found = apply(plan, *tail, memory, generator=renoise)
    outputs = (found,) if isinstance(found, Tensor) else found
    if memory == "staged":
        outputs = tuple(x.detach().requires_grad_() for x in outputs)
    apart = distances(plan, *tail, generator=renoise) if recipe.weights_at != "none" else {}
    return surgery.decode(outputs[0]), outputs, apart, surgery, tail[1]


def _whole(images: Tensor) -> Tensor:
    """The images with NaN as grey: a reward may refuse NaN, and the step is skipped for it all the same."""
    return torch.nan_to_num(images, nan=0.5, posinf=1.0, neginf=0.0)
