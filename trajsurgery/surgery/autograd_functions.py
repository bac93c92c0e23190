"""The autograd Functions of the surgery, the only place that edits gradients.

`pred + (real - pred).detach()` rounds wherever prediction and rollout differ by the order of their values. These
Functions return the real value itself, in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel  # pyright: ignore[reportPrivateUsage]

Call = Callable[[Tensor], Tensor]


def connect(prediction: Tensor, real: Tensor) -> Tensor:
    """Return the value of `real`, exactly; the gradient goes to `prediction` unchanged (LeapAlign, Eq. 6-7)."""
    return _apply(_Edit, prediction, real.detach(), lambda gradient: gradient)


def scale(x: Tensor, factor: float) -> Tensor:
    """Return the value of `x`, exactly, with its gradient times `factor` (Eq. 9); a factor of 0 stops it for real."""
    if factor == 0:
        return x.detach()
    return x if factor == 1 else _apply(_Edit, x, x.detach(), lambda gradient: gradient * factor)


@dataclass
class Gate:
    """Which rows of a batch pass their gradient; it may be set between the forward and the backward pass."""

    rows: Tensor | None = None
    """[batch] of bool; None: all."""


def gated(x: Tensor, gate: Gate) -> Tensor:
    """Return the value of `x`, exactly; in the backward pass only the gate's rows pass their gradient."""

    def passed(gradient: Tensor) -> Tensor:
        rows = gate.rows
        return gradient if rows is None else gradient * rows.reshape(-1, *[1] * (gradient.dim() - 1))

    return _apply(_Edit, x, x.detach(), passed)


def recompute(call: Call, x: Tensor, params: Sequence[Tensor], value: Tensor | None) -> Tensor:
    """Return `call(x)` without keeping its activations: the backward pass runs the call again.

    The autocast and attention-kernel state of the forward pass is restored for it. First-order reverse mode only.

    Args:
        params: the leaves that `call` trains.
        value: the result of `call(x)`, if it is recorded: then the forward pass costs nothing.
    """
    return _apply(_Recompute, call, value, x, *params)


def split(
    x: Tensor,
    kept: tuple[Tensor, Tensor] | None,
    call: Call | None,
    value: Tensor | None,
    params: tuple[Tensor, ...] | None,
    leaves: Sequence[Tensor] = (),
) -> Tensor:
    """Return a call's velocity whose backward pass runs the call's own graph, adding parameter gradients into `.grad`.

    The graph ends at the call's input and output, so autograd never holds a second gradient of the parameters. For
    first-order reverse mode, by `backward()` alone.

    Args:
        kept: (v, input): a call that was made, with its graph; None: `call(x)`, of this value, is run in the backward
            pass.
        params: what receives a gradient; None: every leaf of the call's graph.
        leaves: what a call that is not made yet trains, which must not change before the backward pass.
    """
    token = torch.empty(0, device=x.device, requires_grad=True)
    return _apply(_Split, token, x, kept, call, value, params, leaves)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    # A Function applied under no_grad would cut the graph; the surgery's own edges exist whatever the caller's mode.
    with torch.enable_grad():
        return function.apply(*args)


class _Edit(torch.autograd.Function):
    """The value of one tensor, exactly, with the gradient to another, edited."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, edit: Call) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Call], output: Tensor) -> None:
        _, value, ctx.edit = inputs
        ctx.value_dtype = value.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.edit(grad), None, None  # autograd casts it to the dtype of x

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.edit(tangent).to(ctx.value_dtype, copy=True)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, value: Tensor | None, x: Tensor, *params: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.call = call
        _remember(ctx, x.device.type, params)
        ctx.save_for_backward(x)
        if value is None:
            with torch.no_grad():
                value = call(x.detach())
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: memory='recompute' is first-order only, its gradient would be a constant to the "
                "second derivative. Use memory='retain'."
            )
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        out = _call_again(ctx, x)
        inputs = [v for v, need in zip((x, *ctx.leaves), ctx.needs_input_grad[2:], strict=True) if need]
        gradients = iter(torch.autograd.grad(out, inputs, grad.to(out.dtype), allow_unused=True))
        return None, None, *(next(gradients) if need else None for need in ctx.needs_input_grad[2:])


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        token: Tensor,
        x: Tensor,
        kept: tuple[Tensor, Tensor] | None,
        call: Call | None,
        value: Tensor | None,
        params: tuple[Tensor, ...] | None,
        leaves: Sequence[Tensor],
    ) -> Tensor:
        ctx.kept, ctx.call, ctx.params = kept, call, params
        _remember(ctx, x.device.type, leaves)
        ctx.token = torch.autograd.graph.get_gradient_edge(token).node
        ctx.save_for_backward(*([x] if kept is None else []))
        v = value if kept is None else kept[0]
        assert v is not None, "a call that is not made now has a value"
        return v.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # autograd.grad and backward(inputs=...) run the nodes that they need alone: a leaf of ours is none of them
        if torch.is_grad_enabled() or not torch._C._will_engine_execute_node(ctx.token):  # pyright: ignore[reportPrivateUsage]
            raise RuntimeError(
                "memory='split' adds parameter gradients into .grad as loss.backward() runs: it has no second "
                "derivative (create_graph=True), and torch.autograd.grad and backward(inputs=...) can't use it. Use "
                "memory='retain'."
            )
        v, x = ctx.kept or (None, ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[1]))
        ctx.kept = None
        if v is None:
            v = _call_again(ctx, x)
        backward_of_call(v, x, grad, ctx.params)
        return None, x.grad, None, None, None, None, None


def backward_of_call(v: Tensor, x: Tensor, gradient: Tensor, params: Sequence[Tensor] | None) -> None:
    """Run the backward pass of a call made on x into `.grad`: of x, and of `params` or every leaf of the call."""
    inputs = None if params is None else [*params, *([x] if x.requires_grad else [])]
    if inputs != []:  # torch takes no empty list
        torch.autograd.backward(v, gradient.to(v.dtype), inputs=inputs)


def _call_again(ctx: Any, x: Tensor) -> Tensor:
    """Make a call in the backward pass that the forward pass did not make, or whose graph it did not keep."""
    if [leaf._version for leaf in ctx.leaves] != ctx.versions:
        raise RuntimeError(
            "a parameter was changed in place between the forward and the backward pass: the call, made again, would "
            "give the gradient of another model. Call backward() before optimizer.step()."
        )
    with torch.enable_grad(), ctx.autocast, sdpa_kernel(ctx.kernels):
        v = ctx.call(x)
    if not v.requires_grad:
        raise RuntimeError(
            "the model's call, made again in the backward pass, carries no gradient. Gradient checkpointing of the "
            "reentrant kind loses it where the call's input needs none: pass use_reentrant=False, as diffusers' "
            "enable_gradient_checkpointing() does. Or what trains was frozen since the forward pass."
        )
    return v


def _remember(ctx: Any, device: str, leaves: Sequence[Tensor]) -> None:
    """Keep what the call must find again in the backward pass: its leaves, and the settings that choose its kernels."""
    # Not saved tensors: hooks such as save_on_cpu would hand back copies, which the call does not depend on.
    ctx.leaves, ctx.versions = leaves, [leaf._version for leaf in leaves]
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    ctx.autocast = torch.autocast(device, dtype, enabled, torch.is_autocast_cache_enabled())
    ctx.kernels = _cur_sdpa_kernel_backends()
