"""Image pipelines, each with another transformer class."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image

from tests.builders.pipelines.parts import Small, image_vae, lively, prompts, qwen_vae, small

_BOTH = {"prompt_embeds": (2, 5, 16), "negative_prompt_embeds": (2, 5, 16)}
_MASKS = {"prompt_attention_mask": torch.ones(2, 5), "negative_prompt_attention_mask": torch.ones(2, 5)}
PHOTO = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
MASK = torch.cat([torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 16, 8)], dim=-1)


def _sd3_parts(channels: int = 4) -> tuple[Any, ...]:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return lively(transformer), scheduler, image_vae(channels), None, None, None, None, None, None


_SD3_PROMPTS = _BOTH | {"pooled_prompt_embeds": (2, 10), "negative_pooled_prompt_embeds": (2, 10)}


def sd3() -> Small:
    """Static shift; one batched call for both sides of the guidance."""
    return small(StableDiffusion3Pipeline(*_sd3_parts()), **prompts(_SD3_PROMPTS))


def sd3_inpaint() -> Small:
    """A mask is blended in after every step, in the last three of four."""
    photo = {"image": PHOTO.expand(2, -1, -1, -1), "mask_image": MASK.expand(2, -1, -1, -1), "strength": 0.75}
    return small(StableDiffusion3InpaintPipeline(*_sd3_parts(16)), **photo, **prompts(_SD3_PROMPTS))


def sana() -> Small:
    """Linear attention; a mask over the prompt."""
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
    )
    torch.manual_seed(0)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = SanaPipeline(None, None, vae.eval(), lively(transformer), scheduler)
    plain = {"negative_prompt": None, "use_resolution_binning": False, "height": 32, "width": 32}
    return small(pipe, **plain, **prompts(_BOTH), **_MASKS)


def auraflow() -> Small:
    """The model's timestep lies in [0, 1]; one batched call for both sides of the guidance."""
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pos_embed_max_size=64,
    )
    pipe = AuraFlowPipeline(None, None, image_vae(4), lively(transformer), FlowMatchEulerDiscreteScheduler())
    return small(pipe, negative_prompt=None, **prompts(_BOTH), **_MASKS)


def lumina2() -> Small:
    """Two calls a step, guidance with a limited norm; the timestep rises, the model's output has the opposite sign."""
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = Lumina2Pipeline(lively(transformer), scheduler, image_vae(4), None, None)
    masks = {name: mask.bool() for name, mask in _MASKS.items()}
    return small(pipe, **prompts(_BOTH), **masks)


def z_image() -> Small:
    """Lists of samples; the velocity's sign is flipped; the pipeline asserts float32."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 32, 32],
    )
    pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), image_vae(4), None, None, lively(transformer))
    sides = prompts({"prompt_embeds": (5, 16), "negative_prompt_embeds": (5, 16)})
    embeds = {name: [side, side.flip(0)] for name, side in sides.items()}
    return small(pipe, torch.float32, **embeds)


def cogview4() -> Small:
    """Linear dynamic shift; two calls a step."""
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    pipe = CogView4Pipeline(None, None, image_vae(4), lively(transformer), scheduler)
    return small(pipe, **prompts(_BOTH))


def hidream() -> Small:
    """A mixture of experts: a tensor trains if tokens are sent to it."""
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=10,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = HiDreamImagePipeline(scheduler, image_vae(4), *(None,) * 8, lively(transformer))
    pipe.default_sample_size = 8
    sides = {"t5": (2, 5, 16), "llama3": (2, 2, 5, 16)}
    shapes = {f"{sign}prompt_embeds_{name}": shape for sign in ("", "negative_") for name, shape in sides.items()}
    pooled = {"pooled_prompt_embeds": (2, 10), "negative_pooled_prompt_embeds": (2, 10)}
    return small(pipe, **prompts(shapes | pooled))


def prx() -> Small:
    """The loop reads an output object of `step`; both sides of the guidance in one call."""
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[4, 4]
    )
    pipe = PRXPipeline(lively(transformer), FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, image_vae(4))
    masks = {name: mask[:1].bool() for name, mask in _MASKS.items()}
    embeds = prompts(dict.fromkeys(_BOTH, (1, 5, 16)))
    return small(pipe, negative_prompt=None, use_resolution_binning=False, **embeds, **masks)


def _qwen_transformer() -> Any:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    return lively(transformer)


def _dynamic() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


_QWEN_MASKS = {f"{sign}prompt_embeds_mask": torch.ones(2, 5, dtype=torch.long) for sign in ("", "negative_")}


def qwen_image() -> Small:
    """`true_cfg_scale`, rescaled to the norm of the conditional side."""
    return small(
        QwenImagePipeline(_dynamic(), qwen_vae(), None, None, _qwen_transformer()),
        true_cfg_scale=3.0,
        **prompts(_BOTH),
        **_QWEN_MASKS,
    )


def qwen_img2img() -> Small:
    """The last two of four steps."""
    photo = {"image": PHOTO.expand(2, -1, -1, -1), "strength": 0.5}
    pipe = QwenImageImg2ImgPipeline(_dynamic(), qwen_vae(), None, None, _qwen_transformer())
    return small(pipe, true_cfg_scale=3.0, **photo, **prompts(_BOTH), **_QWEN_MASKS)


def qwen_edit() -> Small:
    """The photograph's tokens stand beside the sample's; the pipeline scales it to a million pixels."""
    photo = Image.fromarray((255 * PHOTO[0].permute(1, 2, 0)).byte().numpy())
    pipe = QwenImageEditPipeline(_dynamic(), qwen_vae(halvings=6), None, None, None, _qwen_transformer())
    one = {name: mask[:1] for name, mask in _QWEN_MASKS.items()}
    size = {"height": 128, "width": 256, "true_cfg_scale": 3.0}
    return small(pipe, torch.float32, image=photo, **size, **prompts(dict.fromkeys(_BOTH, (1, 5, 16))), **one)


BUILDERS = {
    "SD3": sd3,
    "SD3 inpaint": sd3_inpaint,
    "Sana": sana,
    "AuraFlow": auraflow,
    "Lumina2": lumina2,
    "Z-Image": z_image,
    "CogView4": cogview4,
    "HiDream": hidream,
    "PRX": prx,
    "Qwen-Image": qwen_image,
    "Qwen-Image img2img": qwen_img2img,
    "Qwen-Image-Edit": qwen_edit,
}
