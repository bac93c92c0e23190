"""A recorded rollout: every x_t and v_t of the sampler's run, constants to autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.plans.interpolants import Interpolant, RectifiedFlow
from trajsurgery.plans.nodes import START, Draw
from trajsurgery.surgery.deferred_checks import require
from trajsurgery.surgery.parameters import Fields, Params
from trajsurgery.surgery.term_evaluation import Evaluation, evaluate
from trajsurgery.surgery.validation import Generators, check_noise, match_cotangents

_EPS = torch.finfo(torch.float32).eps


def _draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """Return standard normal noise of a batch's shape."""
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise SamplerError(
                f"generator= holds {len(generator)} generators for a batch of {len(like)}: one for each."
            )
        return torch.cat([_draw_noise(x, each) for x, each in zip(like.split(1), generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(
        like.device, non_blocking=not like.is_cpu
    )


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
    """Whether the sampler's steps are Euler's; None: measured, for each step that a plan asks about."""
    start: Tensor | None = None
    """x_T as it was passed in: the leaf that `noise()` gives its gradient to."""
    noises: dict[tuple[Draw, int], Tensor] = field(default_factory=dict[tuple[Draw, int], Tensor])
    """{(draw, to): [batch, *latent]}: noises of renoised samples, each drawn once."""
    sums: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """{t: [batch]}, float32: the sums of the velocities that were dropped; not finite if one of the numbers was not."""
    _measured: dict[int, bool] = field(default_factory=dict[int, bool])
    _sample: int | None = None
    """The one sample that latents, velocities and noises are read of; what is measured and drawn is the batch's."""

    def __post_init__(self) -> None:
        check_sigmas(self.sigmas)
        if not isinstance(self.interpolant, Interpolant):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SamplerError(
                f"the interpolant received is {self.interpolant!r}: it is an object, RectifiedFlow(), Trigonometric(), "
                "Polynomial() or one of your own."
            )
        for name, tensors, lowest in (("latents", self.latents, 0), ("velocities", self.velocities, 1)):
            _check_records(name, tensors, lowest, self.steps)
        shapes = {tuple(a.shape) for a in (*self.latents.values(), *self.velocities.values())}
        if len(shapes) > 1:
            raise SamplerError(f"a trajectory's latents and velocities have one shape; received {sorted(shapes)}.")

    @property
    def steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def __getitem__(self, t: int) -> Tensor:
        return self._rows(self._recorded("x", t))

    def replace(self, t: int, x: Tensor) -> None:
        """Record another x_t: the sampler continued from it instead of the step's own result."""
        self._check(t, 0)
        self.latents[t] = x
        for step in (t, t + 1):  # both begin or end in x_t
            self._measured.pop(step, None)

    def velocity(self, t: int) -> Tensor:
        """Return v_t, [batch, *latent], for t in 1..T."""
        return self._rows(self._recorded("v", t))

    def sigma(self, t: int) -> Tensor:
        """Return the time of t, 0-dim, in [0, 1]."""
        self._check(t, 0)
        return self.sigmas[self.steps - t]

    def drop(self, t: int) -> None:
        """Free x_t and v_t, and keep each sample's sum of v_t."""
        self.sums[t] = sample_sums(self.velocities.pop(t))
        del self.latents[t]

    def times(self, ts: Sequence[int]) -> Tensor:
        """Return the times of several t, [len(ts)], whose numbers are known without reading them off the device."""
        times, known = torch.stack([*map(self.sigma, ts)]), numbers(self.sigmas)
        if not times.is_inference():
            _NUMBERS[times] = times._version, tuple(known[self.steps - t] for t in ts)
        return times

    def note_euler_step(self, t: int) -> None:
        """Record that the sampler's step from x_t is Euler's, which is then not measured."""
        self._measured[t] = True

    def number(self, t: int) -> float:
        """Return the time of t as a number; the device is waited for once a rollout."""
        self._check(t, 0)
        return numbers(self.sigmas)[self.steps - t]

    def is_step(self, t: int) -> bool:
        """Whether `leap(t - 1)` from x_t is the sampler's own step: Euler's, on a rectified flow."""
        if self.euler is None and isinstance(self.interpolant, RectifiedFlow):
            if t not in self._measured:
                self._measured[t] = self._is_euler(t)
            return self._measured[t]
        return bool(self.euler) and isinstance(self.interpolant, RectifiedFlow)

    def _is_euler(self, t: int) -> bool:
        """Whether x_t + dsigma v_t is x_{t-1} up to rounding, element by element. Waits for the device."""
        x, v, landed = self._recorded("x", t), self._recorded("v", t), self._recorded("x", t - 1)
        # schedulers compute in float32 at best; dsigma v is rounded in v's dtype, the sum in that of x_{t-1}
        step, end = (max(torch.finfo(a.dtype).eps, _EPS) for a in (v, landed))
        x, landed = x.double(), landed.double()
        change = (self.sigma(t - 1) - self.sigma(t)).double() * v.double()
        rounding = step * change.abs() + end * landed.abs() + 2 * _EPS * (x.abs().max() + change.abs().max())
        return bool(((x + change - landed).abs() <= rounding).all().item())

    def noise(self, draw: Draw, to: int, generator: Generators = None) -> Tensor:
        """Return the noise of a renoised sample, drawn once for each (draw, to); draw="rollout" is x_T."""
        if draw == "rollout":
            return self[self.steps]
        if (draw, to) not in self.noises:
            self.noises[draw, to] = _draw_noise(self._recorded("x", 0), generator)
        return self._rows(self.noises[draw, to])

    def sample(self, i: int) -> Trajectory:
        """Return the trajectory of sample i alone, [1, *latent], as a view: noises are drawn for the batch."""
        part = copy.copy(self)
        with torch.enable_grad():  # the gradient of `noise()` goes on to the batch's
            start = None if self.start is None else self.start[i : i + 1]
        vars(part).update(start=start, _sample=i)
        return part

    def evaluate(self, expansion: Any, fields: Fields, cotangent: Any, params: Params = None) -> Evaluation:
        """Evaluate the closed form's terms on this trajectory; see `Expansion.evaluate`."""
        cotangents = match_cotangents(cotangent, [self[self.steps]] * len(expansion.outputs))
        return evaluate(expansion, self, fields, cotangents, params)

    def _check(self, t: int, lowest: int) -> None:
        if not isinstance(t, Integral) or not lowest <= t <= self.steps:
            raise PlanError(
                f"t = {t!r} is outside {lowest}..{self.steps}: the trajectory has {self.steps} steps ({START})."
            )

    def _recorded(self, letter: str, t: int) -> Tensor:
        """Return what is recorded at t for the whole batch."""
        recorded, lowest = (self.latents, 0) if letter == "x" else (self.velocities, 1)
        self._check(t, lowest)
        if t not in recorded:
            raise SamplerError(
                f"the trajectory holds no {letter}_{t}, only those of t = {sorted(recorded, reverse=True)}: record all "
                "of them, as rollout() does."
            )
        return recorded[t]

    def _rows(self, batch: Tensor) -> Tensor:
        return batch if self._sample is None else batch[self._sample : self._sample + 1]


def sample_sums(tensor: Tensor) -> Tensor:
    """Return each sample's sum, Float32[batch]: not finite if one of its numbers is not."""
    return tensor.detach().flatten(1).sum(1, dtype=torch.float32) if tensor.dim() > 1 else tensor.detach().float()


def _check_records(name: str, tensors: object, lowest: int, steps: int) -> None:
    """Raise SamplerError unless these can be a trajectory's latents or velocities."""
    if not isinstance(tensors, dict):
        raise SamplerError(f"a trajectory's {name} are a dict of t to tensor; received a {type(tensors).__name__}.")
    for t, a in cast(dict[Any, Any], tensors).items():
        times = isinstance(t, Integral) and lowest <= int(t) <= steps
        if not times or not isinstance(a, Tensor) or not a.is_floating_point():
            kind = str(a.dtype) if isinstance(a, Tensor) else type(a).__name__
            raise SamplerError(
                f"a trajectory's {name} are floating tensors at t = {lowest}..{steps}; received {kind} at t = {t!r}."
            )


def check_sigmas(sigmas: Tensor) -> None:
    """Raise SamplerError unless sigmas is [T + 1], floating, finite, strictly monotone and in [0, 1]."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point() or sigmas.is_meta:  # pyright: ignore[reportUnnecessaryIsInstance]
        kind = f"{sigmas.dtype} on {sigmas.device}" if isinstance(sigmas, Tensor) else type(sigmas).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SamplerError(f"sigmas received {kind}: they are a floating tensor of numbers, or a list of floats.")
    shape = tuple(sigmas.shape)
    if len(shape) != 1 or shape[0] < 2:
        raise SamplerError(
            f"sigmas has shape {shape}; a sampler of T steps has [T + 1] of them, T >= 1, from noise to image."
        )
    values = numbers(sigmas)
    if not all(map(math.isfinite, values)):
        raise SamplerError(f"sigmas holds NaN or Inf: {list(values)}.")
    rises = [later > earlier for earlier, later in pairwise(values)]
    if len(set(values)) < len(values) or any(rises) != all(rises):
        raise SamplerError(f"sigmas is not strictly monotone: {list(values)}. Drop the repeated times.")
    if min(values) < 0 or max(values) > 1:
        raise SamplerError(
            f"sigmas runs from {values[0]:g} to {values[-1]:g}; a flow-matching sampler's times lie in [0, 1]. Is this "
            "a diffusion (variance-preserving or EDM) scheduler?"
        )


_NUMBERS = WeakTensorKeyDictionary()


def numbers(values: Tensor) -> tuple[float, ...]:
    """Return a 1-dim tensor's numbers. They are read off the device once, and again if the tensor changes in place."""
    version = None if values.is_inference() else values._version
    stored = _NUMBERS.get(values)
    if stored is None or version is None or stored[0] != version:
        _NUMBERS[values] = stored = version, tuple(map(float, values.tolist()))
    return stored[1]


def assume_numbers(values: Tensor, earlier: Tensor) -> None:
    """Take the numbers of a 1-dim tensor for those of an earlier one, which should be equal, without reading them.

    Raises:
        SamplerError: they are not equal; inside `deferred_checks` at its end.
    """
    if values.is_inference() or earlier.is_inference():
        return
    _NUMBERS[values] = values._version, numbers(earlier)
    require(
        (values == earlier).all(),
        lambda: SamplerError(
            f"the scheduler made the sigmas {values.tolist()}, and {earlier.tolist()} from the same arguments before: "
            "its schedule is to depend on its arguments alone."
        ),
    )


def pick(values: Tensor, indices: Sequence[int]) -> Tensor:
    """Return some entries of a 1-dim tensor whose numbers are known already, so that nobody reads them off again."""
    chosen, known = values.detach()[list(indices)], numbers(values)
    if not chosen.is_inference():
        _NUMBERS[chosen] = chosen._version, tuple(known[i] for i in indices)
    return chosen


def as_sigmas(sigmas: Tensor | Sequence[float], like: Tensor) -> Tensor:
    """Return sigmas as a checked [T + 1] tensor on the device of the latents."""
    check_noise(like)
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    if isinstance(sigmas, Tensor):
        whole = not (sigmas.is_floating_point() or sigmas.is_complex() or sigmas.dtype == torch.bool)
        check_sigmas(sigmas := sigmas.detach().to(dtype) if whole else sigmas.detach())
        return sigmas.to(like.device)
    try:
        times = torch.tensor(list(sigmas), dtype=dtype, device=like.device)
    except (TypeError, ValueError) as error:
        raise SamplerError(
            f"sigmas received {sigmas!r:.60}: they are T + 1 numbers, from noise to image, [1.0, 0.5, 0.0]."
        ) from error
    check_sigmas(times)
    return times
