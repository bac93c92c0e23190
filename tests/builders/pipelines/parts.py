"""Shared parts of the builders: a pipeline with the arguments of its call, small VAEs, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor, nn

STEPS = 4


@dataclass(frozen=True)
class Small:
    """A pipeline and the arguments of its call."""

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])

    def __call__(self, **changes: Any) -> Any:
        """Call the pipeline with the same noise every time."""
        return self.pipe(**self.again() | changes)

    def again(self) -> dict[str, Any]:
        """The arguments, with newly seeded generators."""
        torch.manual_seed(5)  # samplers that draw noise take it from torch's global generator
        return self.arguments | {"generator": torch.Generator().manual_seed(7)}


def small(pipe: Any, dtype: torch.dtype = torch.float64, **arguments: Any) -> Small:
    """The pipe in the dtype, without progress bars; a call makes STEPS steps and returns tensors."""
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, dtype)
    options = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "pt"} | arguments
    return Small(pipe, {name: _cast(value, dtype) for name, value in options.items()})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(v, dtype) for v in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def lively(module: nn.Module, seed: int = 0) -> Any:
    """Random weights without the zeros of adaptive norms and last layers, so that every parameter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() > 1:
                p.copy_(1.2 * noise / max(p[0].numel(), 1) ** 0.5)
            else:  # norms' weights about one, biases about zero
                p.copy_(float(bool((p == 1).all())) + 0.2 * noise)
    return module.eval()


def prompts(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> dict[str, Tensor]:
    """Random embeddings, by argument."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def image_vae(channels: int, blocks: int = 2, **changes: Any) -> AutoencoderKL:
    """A VAE of images with 2 ** (blocks - 1) pixels a latent."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (4,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "latent_channels": channels,
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "sample_size": 16,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**settings | changes).eval()


def wan_vae(channels: int = 4, **changes: Any) -> AutoencoderKLWan:
    """A VAE of videos with 8 pixels and 4 frames a latent."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "base_dim": 3,
        "z_dim": channels,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [0.1] * channels,
        "latents_std": [1.2] * channels,
    }
    return AutoencoderKLWan(**settings | changes).eval()


def qwen_vae(channels: int = 4, halvings: int = 2) -> AutoencoderKLQwenImage:
    """A VAE of images with 2 ** halvings pixels a latent."""
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1] * (halvings + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * halvings,
        latents_mean=[0.1] * channels,
        latents_std=[1.2] * channels,
    ).eval()
