"""What a GPU's kernels keep for the backward pass, on tensors that have a shape and no device."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _FusedRMSNorm(torch.autograd.Function):
    """Shapes alone: CUDA's fused kernel saves x, one number a row, and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor | None]:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _fused(original: Any) -> Any:
    """The fused kernel, where torch takes it: not for a weight of another dtype, as autocast makes them."""

    def forward(self: nn.RMSNorm, x: Tensor) -> Any:
        weight: Any = self.weight
        if weight is not None and weight.dtype != x.dtype:
            return original(self, x)
        return _FusedRMSNorm.apply(x, weight)

    return forward


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as the flash kernel does it: no matrix of tokens by tokens is kept. A mask changes no shape."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]


def _layer_norm(original: Any) -> Any:
    """CUDA's autocast computes layer norms in float32, the CPU's does not."""

    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return original(x, shape, weight, bias, eps)
        return original(x.float(), shape, weight, bias, eps)

    return norm


@contextmanager
def gpu_kernels() -> Generator[None]:
    """Use flash attention, fused RMSNorm, and layer norms as CUDA's autocast does them: shapes, no values."""
    attention, norm, rms = functional.scaled_dot_product_attention, functional.layer_norm, nn.RMSNorm.forward
    functional.scaled_dot_product_attention = _flash  # pyright: ignore[reportAttributeAccessIssue]
    functional.layer_norm = _layer_norm(norm)
    nn.RMSNorm.forward = _fused(rms)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention
        functional.layer_norm = norm
        nn.RMSNorm.forward = rms


@contextmanager
def flash_attention_only() -> Generator[None]:
    """Use flash attention; every other operation keeps what the CPU's kernels keep."""
    attention = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _flash  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention


KERNELS = {"cuda": gpu_kernels, "cpu": flash_attention_only}
""""cuda" predicts a GPU; "cpu" can be checked on a machine without one, but for attention."""
