"""The value of each primitive other than the model call. All are linear in their parents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import SamplerError
from trajsurgery.plans.interpolants import Interpolant, RectifiedFlow, weights
from trajsurgery.plans.nodes import (
    Advance,
    Connect,
    Detach,
    DetachVelocity,
    Discount,
    Latent,
    Leap,
    Node,
    Noise,
    Recorded,
    Recover,
    Renoise,
    Scale,
    Velocity,
    walk,
)
from trajsurgery.surgery import autograd_functions
from trajsurgery.surgery.trajectory import Generators, Trajectory

Of = Mapping[Node, Tensor]


def node_value(node: Node, of: Of, trajectory: Trajectory, faithful: bool, generator: Generators) -> Tensor:
    """Return the node's value, [batch, *latent], from its parents' values in `of`.

    Args:
        faithful: whether the rollout recorded the value (`graph.is_faithful`).
        generator: draws noises that the trajectory does not hold yet.
    """
    return _VALUES[type(node)](node, of, trajectory, faithful, generator)


def predict(interpolant: Interpolant, x: Tensor, v: Tensor, k: Tensor, j: Tensor) -> Tensor:
    """Return A x + B v: the one-step prediction at sigma j from x and v at sigma k (Eq. 3, Eq. 20)."""
    a, b = interpolant.leap(k, j, torch)
    start = x if isinstance(interpolant, RectifiedFlow) else a * x
    return start + b * v


def _leap(node: Leap, of: Of, trajectory: Trajectory, faithful: bool, _: Any) -> Tensor:
    k, j = _sigma(trajectory, node.x.t), _sigma(trajectory, node.to)
    prediction = predict(trajectory.interpolant, of[node.x], of[node.v], k, j)
    return autograd_functions.connect(prediction, trajectory[_int(node.to)]) if faithful else prediction


def _advance(node: Advance, of: Of, trajectory: Trajectory, *_: Any) -> Tensor:
    order = sorted(node.velocities, key=lambda v: -_int(v.t))
    supports = [_sigma(trajectory, v.t) for v in order]
    ws = weights(node.rule, supports, _sigma(trajectory, node.x.t), _sigma(trajectory, node.to))
    total = of[node.x]
    for w, v in zip(ws, order, strict=True):
        total = total + w * of[v]
    return total


def _renoise(node: Renoise, of: Of, trajectory: Trajectory, _: bool, generator: Generators) -> Tensor:
    to = _sigma(trajectory, node.to)
    eps = trajectory.noise(node.draw, _int(node.to), generator)
    alpha, beta = trajectory.interpolant.alpha(to, torch), trajectory.interpolant.beta(to, torch)
    return alpha * of[node.x] + beta * eps


def _recover(node: Recover, of: Of, trajectory: Trajectory, _: bool, generator: Generators) -> Tensor:
    t = _int(node.x.t)
    alpha, beta = (f(_sigma(trajectory, t), torch) for f in (trajectory.interpolant.alpha, trajectory.interpolant.beta))
    # times are monotone: alpha vanishes at T alone, and only there does the host wait for the device
    if t == trajectory.steps and bool((alpha.abs() < torch.finfo(alpha.dtype).eps).any()):
        raise SamplerError(
            f"recover from t = {t}, where the image's share alpha_t is 0: recover from an earlier step (t < T)."
        )
    drawn = [_int(up.to) for up in walk([node]) if isinstance(up, Renoise) and up.draw == node.draw]
    eps = trajectory.noise(node.draw, drawn[0] if drawn else t, generator)
    return (of[node.x] - beta * eps) / alpha


def _noise(node: Noise, of: Of, trajectory: Trajectory, *_: Any) -> Tensor:
    if not torch.is_grad_enabled():  # its value alone is wanted
        return trajectory[trajectory.steps]
    if trajectory.start is None or not trajectory.start.requires_grad:
        raise SamplerError(
            "noise() gives its gradient to x_T, which requires none: hand rollout() or sample() a noise with "
            "requires_grad_()."
        )
    return trajectory.start


def _sigma(trajectory: Trajectory, t: object) -> Tensor:
    """Return sigma_t, in the latents' precision if that is higher: schedulers' sigmas are float32."""
    sigma = trajectory.sigma(_int(t))
    latent = next(iter(trajectory.latents.values()))  # any: a trajectory made by hand may hold some alone
    return sigma.to(torch.promote_types(sigma.dtype, latent.dtype))


def _int(t: object) -> int:
    assert isinstance(t, int), f"{t!r} was not bound by Plan.prepared"
    return t


_VALUES: dict[type[Node], Callable[..., Tensor]] = {
    Latent: lambda node, of, trajectory, *_: trajectory[node.time],
    Noise: _noise,
    Recorded: lambda node, of, trajectory, *_: trajectory.velocity(node.time),
    Velocity: lambda node, of, trajectory, *_: trajectory.velocity(node.t),  # a faithful call that trains nothing
    Leap: _leap,
    Advance: _advance,
    Connect: lambda node, of, trajectory, *_: autograd_functions.connect(of[node.x], trajectory[node.t]),
    Discount: lambda node, of, *_: autograd_functions.scale(of[node.x], node.a),
    Scale: lambda node, of, *_: autograd_functions.scale(of[node.v], node.a),
    Detach: lambda node, of, *_: of[node.x].detach(),
    DetachVelocity: lambda node, of, *_: of[node.v].detach(),
    Renoise: _renoise,
    Recover: _recover,
}
