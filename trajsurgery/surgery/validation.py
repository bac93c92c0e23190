"""Validation of user input: velocities, noise, cotangents, generators."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import SamplerError

Generators = torch.Generator | Sequence[torch.Generator] | None
"""What draws a batch's noise: one generator, one for each sample (as in diffusers), or torch's global one."""


def call_field(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    t: int | tuple[int, ...] | None = None,
    recorded: Tensor | None = None,
) -> Tensor:
    """Return field(x, sigma), or raise SamplerError unless it is a new tensor like x, with x unchanged.

    Never waits for the device.

    Args:
        x: [batch, *latent].
        t: for the message, each sample's own if they differ; None while the field's leaves are looked up.
        recorded: the rollout's velocity at t, if there is one: its dtype is accepted.
    """
    where = "" if t is None else f", at t = {t}"
    before = change_count(x)
    v: Any = _call(field, x, sigma, where)
    if change_count(x) != before:
        raise SamplerError(
            f"the field changed its input in place{where}: x_t and what was recorded of it are spoilt. Work on a copy "
            "in the field (x = x.clone(), or x * a for x.mul_(a)), and roll out anew."
        )
    if not isinstance(v, Tensor) or v.shape != x.shape:
        received = f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"a {type(v).__name__}"
        raise SamplerError(
            f"the field returned {received} for a latent of shape {tuple(x.shape)}{where}: a velocity is a tensor of "
            "its latent's shape."
        )
    if v.device != x.device:
        raise SamplerError(f"the field returned a velocity on {v.device} for a latent on {x.device}{where}: move it.")
    fits = v.dtype in (x.dtype, x.dtype if recorded is None else recorded.dtype) or t is None
    if not v.is_floating_point() or not (fits or torch.promote_types(v.dtype, x.dtype) == x.dtype):
        raise SamplerError(
            f"the field returned {v.dtype} for a latent of {x.dtype}{where}: the next latent would have another dtype. "
            "Return v.to(x.dtype), or start from noise of the field's dtype."
        )
    if t is not None and torch._C._is_alias_of(v, x):  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
        raise SamplerError(
            f"the field returned its own input, or a view of it{where}: the recorded v_t and x_t would share memory. "
            "Return the prediction; if v = x is meant, a copy (x.clone())."
        )
    return v


def _call(field: Any, x: Tensor, sigma: Tensor, where: str) -> Any:
    """Call the field; rewrite errors of autograd and Python in terms of the field."""
    if not callable(field):
        raise SamplerError(
            f"the field is a {type(field).__name__}, which can't be called{where}: it is a function (x, sigma) -> v."
        )
    try:
        return field(x, sigma)
    except TypeError as error:
        with contextlib.suppress(ValueError):  # a builtin without signature
            try:
                inspect.signature(field).bind(None, None)
            except TypeError:
                raise SamplerError(
                    f"the field can't be called as field(x, sigma){where}: {error}. Wrap it in a function of x and "
                    "sigma, lambda x, sigma: model(x, timestep=sigma, ...)."
                ) from error
        raise
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
        raise SamplerError(
            f"the field changed its input or a parameter in place{where}: {error} Work on a copy (x.clone())."
        ) from error


def change_count(x: Tensor) -> int:
    """Return how often the tensor was changed in place; 0 where torch does not count (inference mode)."""
    return 0 if x.is_inference() else x._version


def check_noise(noise: object) -> None:
    """Raise SamplerError unless x_T is a floating tensor with a batch."""
    if not isinstance(noise, Tensor) or noise.dim() == 0 or not noise.is_floating_point():
        kind = f"{noise.dtype} of shape {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise SamplerError(
            f"the noise received is a {kind}: x_T is a tensor, [batch, *latent], of a floating dtype (torch.randn)."
        )


def check_generator(generator: object) -> None:
    """Raise SamplerError unless this is a torch.Generator, or a list of them."""
    generators: Sequence[object] = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
        raise SamplerError(
            f"generator= received a {type(generator).__name__}: it is a torch.Generator, "
            "torch.Generator().manual_seed(0), or a list of them, one for each sample."
        )


def match_cotangents(cotangent: Any, outputs: Sequence[Tensor], check: bool = True) -> tuple[Tensor, ...]:
    """Return the cotangents as a tuple, one for each output, in its dtype, or raise SamplerError if one does not fit.

    `check` looks for NaN and Inf too, which waits for the device.
    """
    several = isinstance(cotangent, Iterable) and not isinstance(cotangent, Tensor | str | Mapping)
    cotangents: tuple[Any, ...] = tuple(cotangent) if several else (cotangent,)
    shapes = [tuple(output.shape) for output in outputs]
    received = [tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__ for c in cotangents]
    if received != shapes:
        raise SamplerError(
            f"cotangents of shapes {received} for outputs of shapes {shapes}: give one for each output, alike: "
            "d(loss)/d(output), as torch.autograd.grad(loss, outputs) returns it."
        )
    for i, (c, output) in enumerate(zip(cotangents, outputs, strict=True)):
        if not c.is_floating_point() or c.device != output.device:
            raise SamplerError(
                f"cotangent {i} is {c.dtype} on {c.device}, its output {output.dtype} on {output.device}: give it a "
                "floating dtype, on the output's device."
            )
    spoilt = [i for i, c in enumerate(cotangents) if check and _readable(c) and not bool(c.isfinite().all())]
    if spoilt:
        raise SamplerError(
            f"cotangents {spoilt} hold NaN or Inf: every parameter would get NaN. Look at the reward and at the "
            "decoder (bfloat16 overflows there), or skip this batch."
        )
    return tuple(c.to(output.dtype) for c, output in zip(cotangents, outputs, strict=True))


def check_finite(latents: Mapping[int, Tensor], velocities: Mapping[int, Tensor]) -> None:
    """Raise SamplerError if x_0 is not finite, naming the first t that is not. Waits for the device once.

    NaN at one step makes all later steps NaN, so x_0 is enough to look at first.
    """
    if not _readable(latents[0]) or bool(latents[0].isfinite().all()):
        return
    for t in sorted(latents, reverse=True):
        for name, tensor in (("x", latents[t]), ("v", velocities.get(t, latents[t]))):
            bad = ~tensor.isfinite().flatten(1 if tensor.dim() > 1 else 0).all(-1)
            if bool(bad.any()):
                what = "the noise handed in" if t == max(latents) and name == "x" else f"{name}_{t}"
                raise SamplerError(
                    f"the rollout's x_0 holds NaN or Inf: {what} is the first that does, in {int(bad.sum())} of "
                    f"{bad.numel()} samples. Look at the field there (float16 overflows; a wider dtype holds more)."
                )


def _readable(x: Tensor) -> bool:
    """Whether a tensor's numbers can be read: not of fake or sharded tensors, nor under a torch.func transform."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta
    return plain and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
