"""A recorded rollout: every x_t and v_t of the sampler's own run, constants to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.interpolant import Interpolant, RectifiedFlow
from trajsurgery.node import START, Draw
from trajsurgery.params import Fields, Params
from trajsurgery.terms import Evaluation, evaluate

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The latents and velocities of one rollout, by time: `trajectory[t]` is x_t, t from T (noise) to 0 (image)."""

    sigmas: Tensor
    """[T + 1], strictly monotone; sigmas[T - t] is the time of t."""
    latents: dict[int, Tensor]
    """{t: [batch, *latent]} for t in T..0."""
    velocities: dict[int, Tensor]
    """{t: [batch, *latent]} for t in T..1, after guidance."""
    interpolant: Interpolant = field(default_factory=RectifiedFlow)
    euler: bool | None = True
    """Whether the sampler's steps are Euler's; None: it is measured, for each step that a plan asks about."""
    start: Tensor | None = None
    """x_T as it was handed in: the leaf that `noise()` gives its gradient to."""
    noises: dict[tuple[Draw, int], Tensor] = field(default_factory=dict[tuple[Draw, int], Tensor])
    """{(draw, to): [batch, *latent]}: what renoised samples are made of, drawn once."""
    _measured: dict[int, bool] = field(default_factory=dict[int, bool])

    def __post_init__(self) -> None:
        check_sigmas(self.sigmas)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def __getitem__(self, t: int) -> Tensor:
        self._check(t, 0)
        return self.latents[t]

    def replace(self, t: int, x: Tensor) -> None:
        """Records another x_t: the sampler went on with it instead of the one that its step gave."""
        self.latents[t] = x
        self._measured.pop(t + 1, None)

    def velocity(self, t: int) -> Tensor:
        """v_t, [batch, *latent], for t in 1..T."""
        self._check(t, 1)
        return self.velocities[t]

    def sigma(self, t: int) -> Tensor:
        """The time of t, 0-dim, in [0, 1]."""
        self._check(t, 0)
        return self.sigmas[self.steps - t]

    def is_step(self, t: int) -> bool:
        """Whether `leap(t - 1)` from x_t is the sampler's own step: Euler's, on a rectified flow."""
        if self.euler is not None or not isinstance(self.interpolant, RectifiedFlow):
            return bool(self.euler) and isinstance(self.interpolant, RectifiedFlow)
        if t not in self._measured:
            self._measured[t] = self._is_euler(t)
        return self._measured[t]

    def _is_euler(self, t: int) -> bool:
        """Whether x_t + dsigma v_t is x_{t-1} up to rounding, element by element. Waits for the device."""
        x, v, landed = (a.double() for a in (self[t], self.velocity(t), self[t - 1]))
        change = (self.sigma(t - 1) - self.sigma(t)).double() * v
        # schedulers compute in float32 at best; dsigma v is rounded in v's dtype, the sum in that of x_{t-1}
        step, end = (max(torch.finfo(a.dtype).eps, _EPS) for a in (self.velocity(t), self[t - 1]))
        rounding = step * change.abs() + end * landed.abs() + 2 * _EPS * (x.abs().max() + change.abs().max())
        return bool(((x + change - landed).abs() <= rounding).all().item())

    def noise(self, draw: Draw, to: int, generator: torch.Generator | None = None) -> Tensor:
        """The noise of a renoised sample, drawn once for each (draw, to); draw="rollout" is x_T."""
        if draw == "rollout":
            return self[self.steps]
        if (draw, to) not in self.noises:
            like = self[0]
            device = like.device if generator is None else generator.device
            self.noises[draw, to] = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(
                like.device
            )
        return self.noises[draw, to]

    def evaluate(self, expansion: Any, fields: Fields, cotangent: Any, params: Params = None) -> Evaluation:
        """The closed form's terms on this trajectory: what `Expansion.evaluate` returns."""
        return evaluate(expansion, self, fields, cotangent, params)

    def _check(self, t: int, lowest: int) -> None:
        if not lowest <= t <= self.steps:
            raise PlanError(
                f"t = {t} is outside {lowest}..{self.steps}: the trajectory has {self.steps} steps ({START})."
            )


def check_sigmas(sigmas: Tensor) -> None:
    """Raises SamplerError unless sigmas is [T + 1], finite, strictly monotone and in [0, 1]."""
    shape = tuple(sigmas.shape)
    if len(shape) != 1 or shape[0] < 2:
        raise SamplerError(
            f"sigmas has shape {shape}; a sampler of T steps has [T + 1] of them, T >= 1, from noise to image."
        )
    known = sigmas.detach().double().cpu()
    if not bool(torch.isfinite(known).all()):
        raise SamplerError(f"sigmas holds NaN or Inf: {known.tolist()}.")
    steps = known.diff()
    if not (bool((steps < 0).all()) or bool((steps > 0).all())):
        raise SamplerError(f"sigmas is not strictly monotone: {known.tolist()}. Drop the repeated times.")
    if bool((known < 0).any()) or bool((known > 1).any()):
        raise SamplerError(
            f"sigmas runs from {known[0]:g} to {known[-1]:g}; a flow-matching sampler's times lie in [0, 1]. Is this a "
            "diffusion (variance-preserving or EDM) scheduler?"
        )


def as_sigmas(sigmas: Tensor | Sequence[float], like: Tensor) -> Tensor:
    """Sigmas as a checked [T + 1] tensor on the device of the latents."""
    if isinstance(sigmas, Tensor):
        times = sigmas.detach().to(like.device)
    else:
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        times = torch.tensor(list(sigmas), dtype=dtype, device=like.device)
    check_sigmas(times)
    return times
