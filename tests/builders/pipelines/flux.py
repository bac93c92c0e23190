"""Flux and related pipelines: packed latents, rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)

from tests.builders.pipelines.parts import Small, image_vae, lively, prompts, small

_SIZES = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}
_PHOTO = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
_MASK = torch.cat([torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 16, 8)], dim=-1)


def flux_parts(guided: bool = True) -> tuple[Any, ...]:
    transformer = FluxTransformer2DModel(in_channels=16, pooled_projection_dim=10, guidance_embeds=guided, **_SIZES)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return scheduler, image_vae(4), None, None, None, None, lively(transformer)


FLUX_PROMPTS = {"prompt_embeds": (2, 5, 12), "pooled_prompt_embeds": (2, 10)}
_NEGATIVE = {"negative_prompt_embeds": (2, 5, 12), "negative_pooled_prompt_embeds": (2, 10)}


def flux() -> Small:
    """Guidance is an input; dynamic shift."""
    return small(FluxPipeline(*flux_parts()), **prompts(FLUX_PROMPTS))


def flux_true_cfg() -> Small:
    """Two calls a step beside the distilled guidance."""
    return small(FluxPipeline(*flux_parts()), true_cfg_scale=3.0, **prompts(FLUX_PROMPTS | _NEGATIVE))


def flux_img2img() -> Small:
    """The last two of four steps, from a noised photograph."""
    photo = {"image": _PHOTO.expand(2, -1, -1, -1), "strength": 0.5}
    return small(FluxImg2ImgPipeline(*flux_parts()), **photo, **prompts(FLUX_PROMPTS))


def flux_inpaint() -> Small:
    """A mask is blended in after every step, in the last three of four."""
    photo = {"image": _PHOTO.expand(2, -1, -1, -1), "mask_image": _MASK.expand(2, -1, -1, -1), "strength": 0.75}
    return small(FluxInpaintPipeline(*flux_parts()), **photo, **prompts(FLUX_PROMPTS))


def flux_kontext() -> Small:
    """The photograph's tokens stand beside the sample's: the model's output is cut."""
    photo = {"image": _PHOTO, "max_area": 256, "_auto_resize": False}
    one = prompts({"prompt_embeds": (1, 5, 12), "pooled_prompt_embeds": (1, 10)})
    return small(FluxKontextPipeline(*flux_parts()), **photo, **one)


def flux2_parts(guided: bool) -> tuple[Any, ...]:
    sizes = _SIZES | {"axes_dims_rope": (2, 2, 2, 2)}
    transformer = Flux2Transformer2DModel(in_channels=16, timestep_guidance_channels=8, guidance_embeds=guided, **sizes)
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=16,
    )
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae.eval(), None, None, lively(transformer)


def flux2() -> Small:
    """`latents=` has another layout than the loop's."""
    return small(Flux2Pipeline(*flux2_parts(True)), **prompts({"prompt_embeds": (2, 5, 12)}))


def flux2_klein() -> Small:
    """Classifier-free guidance in two calls."""
    embeds = prompts({"prompt_embeds": (2, 5, 12), "negative_prompt_embeds": (2, 5, 12)})
    return small(Flux2KleinPipeline(*flux2_parts(False)), guidance_scale=4.0, **embeds)


def chroma() -> Small:
    """Modulations come from a separate small network; masked prompts."""
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
        **_SIZES,
    )
    embeds = prompts({"prompt_embeds": (2, 5, 12), "negative_prompt_embeds": (2, 5, 12)})
    masks = {"prompt_attention_mask": torch.ones(2, 5), "negative_prompt_attention_mask": torch.ones(2, 5)}
    parts = (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), image_vae(4), None, None, lively(transformer))
    return small(ChromaPipeline(*parts), **embeds, **masks)


def ovis() -> Small:
    """Negative embeddings in a second call."""
    transformer = OvisImageTransformer2DModel(in_channels=16, out_channels=16, **_SIZES)
    embeds = prompts({"prompt_embeds": (2, 5, 12), "negative_prompt_embeds": (2, 5, 12)})
    parts = (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), image_vae(4), None, None, lively(transformer))
    return small(OvisImagePipeline(*parts), negative_prompt=None, **embeds)


def bria() -> Small:
    """One batched call for both sides of the guidance."""
    sizes = _SIZES | {"axes_dims_rope": [2, 2, 4]}
    transformer = BriaTransformer2DModel(in_channels=16, pooled_projection_dim=None, **sizes)
    embeds = prompts({"prompt_embeds": (2, 5, 12), "negative_prompt_embeds": (2, 5, 12)})
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return small(BriaPipeline(lively(transformer), scheduler, image_vae(4, shift_factor=0.0), None, None), **embeds)


BUILDERS = {
    "Flux": flux,
    "Flux, true CFG": flux_true_cfg,
    "Flux img2img": flux_img2img,
    "Flux inpaint": flux_inpaint,
    "Flux Kontext": flux_kontext,
    "Flux2": flux2,
    "Flux2 Klein": flux2_klein,
    "Chroma": chroma,
    "Ovis": ovis,
    "Bria": bria,
}
