"""Real diffusers transformers as velocity fields, as small as their classes allow, in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.models.normalization as normalization
import diffusers.models.transformers.transformer_flux as transformer_flux
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn


class FluxField(nn.Module):
    """FluxTransformer2DModel on packed latents [batch, 4 tokens, 4]."""

    shape = (4, 4)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=6,
            pooled_projection_dim=6,
            guidance_embeds=False,
            axes_dims_rope=(2, 2, 4),
        )
        lively(self)
        self.register_buffer("text", torch.randn(1, 2, 6))
        self.register_buffer("pooled", torch.randn(1, 6))
        places = torch.tensor([[0.0, i, j] for i in range(2) for j in range(2)])
        self.register_buffer("places", places)
        self.to(torch.float64)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.model(
            hidden_states=x,
            encoder_hidden_states=self.text.expand(len(x), -1, -1),
            pooled_projections=self.pooled.expand(len(x), -1),
            timestep=sigma.expand(len(x)),
            img_ids=self.places,
            txt_ids=torch.zeros(2, 3, dtype=x.dtype),
            return_dict=False,
        )[0]


class SD3Field(nn.Module):
    """SD3Transformer2DModel, its queries and keys RMS-normed as in SD3.5, on latents [batch, 2, 4, 4]."""

    shape = (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=2,
            out_channels=2,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=6,
            caption_projection_dim=8,
            pooled_projection_dim=6,
            pos_embed_max_size=4,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        lively(self)
        self.register_buffer("text", torch.randn(1, 2, 6))
        self.register_buffer("pooled", torch.randn(1, 6))
        self.to(torch.float64)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.model(
            hidden_states=x,
            encoder_hidden_states=self.text.expand(len(x), -1, -1),
            pooled_projections=self.pooled.expand(len(x), -1),
            timestep=1000 * sigma.expand(len(x)),
            return_dict=False,
        )[0]


def lively(module: nn.Module) -> None:
    """Enlarge the weights, so that the velocity field is far from linear."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2.0) if p.dim() > 1 else p.add_(0.2 * torch.randn_like(p))


@functools.cache
def flux() -> FluxField:
    """The same instance for all tests."""
    return FluxField()


@functools.cache
def sd3() -> SD3Field:
    """The same instance for all tests."""
    return SD3Field()


def _rotary(x: Tensor, freqs_cis: tuple[Tensor, Tensor], sequence_dim: int = 2, **_: object) -> Tensor:
    cos, sin = (f[None, :, None, :] if sequence_dim == 1 else f[None, None] for f in freqs_cis)
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return x * cos + turned * sin


def _rms(self: nn.Module, x: Tensor) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
    return normed if self.weight is None else normed * self.weight


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Flux's RoPE and SD3's RMSNorm without their casts to float32."""
    rotary, rms = transformer_flux.apply_rotary_emb, normalization.RMSNorm.forward
    transformer_flux.apply_rotary_emb, normalization.RMSNorm.forward = _rotary, _rms
    try:
        yield
    finally:
        transformer_flux.apply_rotary_emb, normalization.RMSNorm.forward = rotary, rms
