"""The loss (LeapAlign, Eq. 11-13): a hinge on the reward, weighted by how close the leaps land to the trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.plans.graph import faithful
from trajsurgery.plans.nodes import Advance, Leap
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.training.settings import WeightsAt

DETACHED = (
    "the reward's scores carry no gradient: it runs under no_grad or inference_mode, or detaches its images. Use a "
    "variant of it that keeps the graph from the images, Float[batch 3 h w] in [0, 1], to the scores."
)


@dataclass(frozen=True, eq=False)
class Weights:
    """Similarity weights of a batch, constants to autograd."""

    w: Tensor
    """[batch], above 0."""
    clamped: Tensor
    """0-dim: the share of distances below tau."""


def landings(plan: Plan, trajectory: Trajectory) -> tuple[int, ...]:
    """Return the times, falling, at which leaps and advances land that are not the sampler's own step."""
    bound = plan.prepared(trajectory.steps)
    own_steps = faithful(bound.outputs, trajectory.is_step)
    times = {n.t for n in bound.nodes if isinstance(n, Leap | Advance) and n not in own_steps and isinstance(n.t, int)}
    return tuple(sorted(times, reverse=True))


def measured_landings(where: WeightsAt, landed: Sequence[int]) -> tuple[int, ...]:
    """Return the landings at which similarity is measured.

    Raises:
        RecipeError: a word other than "all", "none", "j".
    """
    if isinstance(where, str):
        if where not in ("all", "none", "j"):
            raise RecipeError(f'weights_at = {where!r}: it is "all", "none", "j", or a tuple of times such as (0,).')
        return {"all": tuple(landed), "none": (), "j": tuple(t for t in landed if t != 0)}[where]
    return tuple(t for t in landed if t in where)


def weights(
    plan: Plan | PerSample, trajectory: Trajectory, distances: Mapping[int, Tensor], weights_at: WeightsAt, tau: float
) -> Weights:
    """Return w = 1 / sum_t max(d_t, tau) (Eq. 12); 1 where nothing is measured.

    Unlike Eq. 12, a leap that is the sampler's own step (k = j + 1) is left out of the sum instead of counting as tau:
    its error is zero, and plans of many steps would be weighted by their number of steps. With a plan for each sample,
    each is measured where its own leaps land.

    Args:
        distances: {t: [batch]}, from `trajsurgery.distances` or `surgery.distances`.
        weights_at: where to measure; independent of where the reward is evaluated.
        tau: above 0.
    """
    if isinstance(plan, PerSample):
        weights_of_samples = [
            weights(sample_plan, trajectory.sample(i), {t: d[i : i + 1] for t, d in distances.items()}, weights_at, tau)
            for i, sample_plan in enumerate(plan.plans)
        ]
        return Weights(
            torch.cat([sample_weights.w for sample_weights in weights_of_samples]),
            torch.stack([sample_weights.clamped for sample_weights in weights_of_samples]).mean(),
        )
    times = measured_landings(weights_at, landings(plan, trajectory)) if weights_at != "none" else ()
    if not times:
        latents = trajectory[0]
        return Weights(latents.new_ones(len(latents), dtype=torch.float32), latents.new_zeros((), dtype=torch.float32))
    d = torch.stack([distances[t].detach() for t in times])
    return Weights(1 / d.clamp(min=tau).sum(0), (d <= tau).float().mean())


def hinge(scores: Tensor, threshold: float) -> Tensor:
    """max(0, lambda - r), [batch] (Eq. 11)."""
    return (threshold - scores).clamp(min=0)


def loss(scores: Sequence[Tensor], w: Tensor, threshold: float) -> Tensor:
    """Sum over outputs of the batch's mean of w * max(0, lambda - r), 0-dim (Eq. 13; Algorithm 1 sums over outputs).

    Args:
        scores: the rewards of each output, [batch].
        w: [batch].
    """
    return torch.stack([(w.detach() * hinge(score, threshold)).mean() for score in scores]).sum()


def cotangents(value: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return d(loss)/d(output) for each output; this runs and frees the graph of decoder and reward.

    The transformer's backward pass needs these alone, so its memory and the reward's are not held at once.

    Raises:
        RecipeError: the reward cuts the gradient.
    """
    if not value.requires_grad:
        raise RecipeError(DETACHED)
    return torch.autograd.grad(value, tuple(outputs))
