"""The loss (LeapAlign, Eq. 11-13): a hinge on the reward, weighted by how close the leaps land to the trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.plans.graph import faithful
from trajsurgery.plans.nodes import Advance, Connect, Detach, Discount, LatentNode, Leap
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
    distance: Tensor
    """0-dim: the mean distance; 0 where nothing is measured."""


def landings(plan: Plan, trajectory: Trajectory) -> tuple[int, ...]:
    """Return the times, falling, at which the predictions of a plan land: where Eq. 12 may measure them.

    A leap or advance that a connector follows is a prediction, also where it is the sampler's own step (k = j + 1). So
    is an output that starts from a connector: the reward may look at the prediction (Fig. 4c). Of the others, those
    that are the sampler's own steps are left out (DRTune, DRaFT-K), or plans would be weighted by their number of
    steps.
    """
    bound = plan.prepared(trajectory.steps)
    own_steps = faithful(bound.outputs, trajectory.is_step)
    connected = {_underlying(node.x) for node in bound.nodes if isinstance(node, Connect)}
    landed = [node for node in bound.nodes if isinstance(node, Leap | Advance)]
    ends = {end for end in map(_underlying, bound.outputs) if isinstance(end, Leap | Advance)}
    connected |= {end for end in ends if isinstance(_underlying(end.x), Connect)}
    return tuple(sorted({int(node.t) for node in landed if node in connected or node not in own_steps}, reverse=True))


def _underlying(x: LatentNode) -> LatentNode:
    """Return the latent whose value discounts and detaches pass on."""
    while isinstance(x, Discount | Detach):
        x = x.x
    return x


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

    A connected leap that is the sampler's own step has distance 0 and counts as tau; see `landings`. With a plan for
    each sample, each is measured where its own leaps land.

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
            torch.stack([sample_weights.distance for sample_weights in weights_of_samples]).mean(),
        )
    times = measured_landings(weights_at, landings(plan, trajectory)) if weights_at != "none" else ()
    if not times:
        latents = trajectory[0]
        zero = latents.new_zeros((), dtype=torch.float32)
        return Weights(latents.new_ones(len(latents), dtype=torch.float32), zero, zero)
    d = torch.stack([distances[t].detach() for t in times])
    return Weights(1 / d.clamp(min=tau).sum(0), (d <= tau).float().mean(), d.float().mean())


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
