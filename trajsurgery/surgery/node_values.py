"""The value of each primitive other than the model call. All are linear in their parents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import SamplerError
from trajsurgery.plans import nodes
from trajsurgery.plans.interpolants import Interpolant, RectifiedFlow, weights
from trajsurgery.plans.nodes import Node, Time, walk
from trajsurgery.plans.step_gain import StepGain
from trajsurgery.surgery import autograd_functions
from trajsurgery.surgery.deferred_checks import require
from trajsurgery.surgery.validation import Generators

Of = Mapping[Node, Tensor]


def node_value(node: Node, of: Of, trajectory: Any, faithful: bool, generator: Generators) -> Tensor:
    """Return the node's value, [batch, *latent], from its parents' values in `of`.

    Args:
        trajectory: a `Trajectory`.
        faithful: whether the rollout recorded the value (`graph.is_faithful`).
        generator: draws noises that the trajectory does not hold yet.
    """
    return _VALUES[type(node)](node, of, trajectory, faithful, generator)


def predict(interpolant: Interpolant, x: Tensor, v: Tensor, k: Tensor, j: Tensor) -> Tensor:
    """Return A x + B v: the one-step prediction at sigma j from x and v at sigma k (Eq. 3, Eq. 20)."""
    a, b = interpolant.leap(k, j, torch)
    return (x if isinstance(interpolant, RectifiedFlow) else a * x) + b * v


def _scale(node: nodes.Scale, of: Of, trajectory: Any, *_: Any) -> Tensor:
    gain: Any = node.a.value(trajectory.number) if isinstance(node.a, StepGain) else node.a
    return autograd_functions.scale(of[node.v], gain)


def _leap(node: nodes.Leap, of: Of, trajectory: Any, faithful: bool, _: Any) -> Tensor:
    k, j = _sigma(trajectory, node.x.t), _sigma(trajectory, node.to)
    prediction = predict(trajectory.interpolant, of[node.x], of[node.v], k, j)
    return autograd_functions.connect(prediction, trajectory[node.to]) if faithful else prediction


def _advance(node: nodes.Advance, of: Of, trajectory: Any, *_: Any) -> Tensor:
    order = sorted(node.velocities, key=lambda v: -int(v.t))
    supports = [_sigma(trajectory, v.t) for v in order]
    ws = weights(node.rule, supports, _sigma(trajectory, node.x.t), _sigma(trajectory, node.to))
    return sum((w * of[v] for w, v in zip(ws, order, strict=True)), start=of[node.x])


def _renoise(node: nodes.Renoise, of: Of, trajectory: Any, _: bool, generator: Generators) -> Tensor:
    alpha, beta = _shares(trajectory, node.to)
    return alpha * of[node.x] + beta * trajectory.noise(node.draw, node.to, generator)


def _recover(node: nodes.Recover, of: Of, trajectory: Any, _: bool, generator: Generators) -> Tensor:
    t = node.x.t
    alpha, beta = _shares(trajectory, t)
    # times are monotone: alpha vanishes at T alone, and only there is it looked at
    if t == trajectory.steps:
        require(
            (alpha.abs() >= torch.finfo(alpha.dtype).eps).all(),
            lambda: SamplerError(
                f"recover from t = {t}, where the image's share alpha_t is 0: recover from an earlier step (t < T)."
            ),
        )
    drawn = [up.to for up in walk([node]) if isinstance(up, nodes.Renoise) and up.draw == node.draw]
    eps = trajectory.noise(node.draw, drawn[0] if drawn else t, generator)
    return (of[node.x] - beta * eps) / alpha


def _noise(node: nodes.Noise, of: Of, trajectory: Any, *_: Any) -> Tensor:
    if not torch.is_grad_enabled():  # its value alone is wanted
        return trajectory[trajectory.steps]
    if trajectory.start is None or not trajectory.start.requires_grad:
        raise SamplerError(
            "noise() gives its gradient to x_T, which requires none: hand rollout() or sample() a noise with "
            "requires_grad_()."
        )
    return trajectory.start


def _shares(trajectory: Any, t: Time) -> tuple[Tensor, Tensor]:
    """Return alpha_t and beta_t, the shares of image and noise."""
    alpha, beta, *_ = trajectory.interpolant.shares(_sigma(trajectory, t), torch)
    return alpha, beta


def _sigma(trajectory: Any, t: Time) -> Tensor:
    """Return sigma_t, in the latents' precision if that is higher: schedulers' sigmas are float32."""
    sigma = trajectory.sigma(t)
    latent = next(iter(trajectory.latents.values()))  # any: a trajectory made by hand may hold some alone
    return sigma.to(torch.promote_types(sigma.dtype, latent.dtype))


_VALUES: dict[type[Node], Callable[..., Tensor]] = {
    nodes.Latent: lambda node, of, trajectory, *_: trajectory[node.time],
    nodes.Noise: _noise,
    nodes.Recorded: lambda node, of, trajectory, *_: trajectory.velocity(node.time),
    nodes.Velocity: lambda node, of, trajectory, *_: trajectory.velocity(node.t),  # a faithful call that trains nothing
    nodes.Leap: _leap,
    nodes.Advance: _advance,
    nodes.Connect: lambda node, of, trajectory, *_: autograd_functions.connect(of[node.x], trajectory[node.t]),
    nodes.Discount: lambda node, of, *_: autograd_functions.scale(of[node.x], node.a),
    nodes.Scale: _scale,
    nodes.Detach: lambda node, of, *_: of[node.x].detach(),
    nodes.DetachVelocity: lambda node, of, *_: of[node.v].detach(),
    nodes.Renoise: _renoise,
    nodes.Recover: _recover,
}
