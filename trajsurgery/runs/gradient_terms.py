"""How large each kind of term of the closed form is in a run's gradient, measured now and then on a few images."""

from __future__ import annotations

import torch

from trajsurgery.pipelines.operate import operate
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.api import distances
from trajsurgery.training import objective, srpo_support
from trajsurgery.training.components import PromptCache, RunComponents, pipeline_arguments
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.step_gradient import draw_plans
from trajsurgery.training.training_loop import as_argument, iteration_generator, sample_generators

IMAGES = 2
MOST_TERMS = 16
MOST_NUMBERS = 4 * 10**8
"""The terms' gradients are held at once, in as many numbers at most: larger runs go without."""


def term_norms(recipe: Recipe, components: RunComponents, iteration: int) -> dict[str, float] | None:
    """Return {"single-step": norm, "nested once": norm, ...} of an iteration's plan, on up to two held-out prompts.

    The cotangent is that of the loss with its hinge open, so that scores above lambda count too. None where it can't be
    had cheaply: with sharded weights, several ranks, plans with many terms, several outputs or noise of their own, or
    SRPO's guided velocities; and where the loss's gradient is not finite.
    """
    plan = _plan_of(recipe, iteration)
    trained = [p for p in components.module.parameters() if p.requires_grad]
    if plan is None or ranks.count() > 1 or sharding.is_sharded(components.module):
        return None
    expansion = plan.gradient(limit=MOST_TERMS)
    numbers = len(expansion.terms) * sum(p.numel() for p in trained)
    if expansion.count > len(expansion.terms) or numbers > MOST_NUMBERS:
        return None
    count = min(IMAGES, recipe.rollout.at_once or IMAGES)  # no more at once than the run's own rollouts have
    texts = [prompt.text for prompt in components.heldout[:count]]
    generators = sample_generators(iteration_generator(recipe.seed, iteration, "noise"), len(texts))
    call = {**pipeline_arguments(recipe), **PromptCache(components.pipe, texts, pipeline_arguments(recipe))(texts)}
    with torch.no_grad(), operate(components.pipe) as surgery:
        call |= {"num_inference_steps": recipe.rollout.steps, "output_type": "latent"}
        components.pipe(**call, generator=as_argument(generators))
    trajectory, field = surgery.trajectory, surgery.field
    x_0 = trajectory[0].detach().requires_grad_()
    score = components.reward(torch.nan_to_num(surgery.decode(x_0), nan=0.5, posinf=1.0, neginf=0.0), texts)
    landed = distances(plan, trajectory, field) if recipe.weights_at != "none" else {}
    weights = objective.weights(plan, trajectory, landed, recipe.weights_at, recipe.objective.tau)
    loss = objective.loss([score], weights.w, float(score.detach().max()) + 1)
    (cotangent,) = objective.cotangents(loss, (x_0,))
    if not bool(cotangent.isfinite().all()):
        return None
    return expansion.evaluate(trajectory, field, cotangent, trained).by_kind


def _plan_of(recipe: Recipe, iteration: int) -> Plan | None:
    """Return the plan that an iteration draws; the first one, if it draws several."""
    drawn = draw_plans(recipe, iteration_generator(recipe.seed, iteration, "plan"))[0]
    plan = drawn.plans[0] if isinstance(drawn, PerSample) else drawn
    draws_noise = any(node.op == "renoise" for node in plan.nodes)
    return None if len(plan.outputs) > 1 or draws_noise or srpo_support.needs_guided_field(plan) else plan
