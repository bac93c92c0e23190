"""Small pipelines of real diffusers and transformers classes, with random weights; prompt embeddings are passed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)


@dataclass(frozen=True)
class Small:
    """A pipeline and the arguments of its call."""

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])

    def __call__(self, **changes: Any) -> Any:
        """Call the pipeline with the same noise every time."""
        generator = torch.Generator().manual_seed(7)
        return self.pipe(**self.arguments | {"generator": generator} | changes)


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=0.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _lively(module: torch.nn.Module) -> torch.nn.Module:
    """Enlarge the weights, so that the velocity field is far from linear."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2.0) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return module.eval()


def flux(dtype: torch.dtype = torch.float32, batch: int = 2, steps: int = 6) -> Small:
    """FluxPipeline: packed latents, guidance as an input, dynamic shift."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, _vae(4), None, None, None, None, _lively(transformer)).to(dtype)
    arguments = {
        "prompt_embeds": torch.randn(batch, 5, 12, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(batch, 10, dtype=dtype),
        "height": 16,
        "width": 16,
        "num_inference_steps": steps,
        "guidance_scale": 3.5,
        "output_type": "pt",
    }
    pipe.set_progress_bar_config(disable=True)
    return Small(pipe, arguments)


def sd3(dtype: torch.dtype = torch.float32, batch: int = 2, steps: int = 6) -> Small:
    """StableDiffusion3Pipeline: real classifier-free guidance, static shift, dual attention as in SD3.5-Medium."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(_lively(transformer), scheduler, _vae(4), None, None, None, None, None, None).to(
        dtype
    )
    arguments = {
        "prompt_embeds": torch.randn(batch, 5, 12, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(batch, 10, dtype=dtype),
        "negative_prompt_embeds": torch.randn(batch, 5, 12, dtype=dtype),
        "negative_pooled_prompt_embeds": torch.randn(batch, 10, dtype=dtype),
        "height": 16,
        "width": 16,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "output_type": "pt",
    }
    pipe.set_progress_bar_config(disable=True)
    return Small(pipe, arguments)


PIPELINES: dict[str, Callable[..., Small]] = {"flux": flux, "sd3": sd3}
"""The pipelines of parametrised tests, by name."""
