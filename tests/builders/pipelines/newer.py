"""Pipelines that were added after `operate` was written, to test loops that it was not designed for."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance

from tests.builders.pipelines.flux import FLUX_PROMPTS, flux_parts
from tests.builders.pipelines.images import PHOTO
from tests.builders.pipelines.parts import Small, image_vae, lively, prompts, qwen_vae, small, wan_vae
from tests.builders.pipelines.video import unipc

_BOTH = {"prompt_embeds": (2, 5, 16), "negative_prompt_embeds": (2, 5, 16)}
ONE = dict.fromkeys(_BOTH, (1, 5, 16))
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 16,
    "rope_max_seq_len": 32,
    "freq_dim": 16,
}


def _static() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def lumina() -> Small:
    """Guidance on three channels of four; a learnt variance is cut off; rotary positions by the timestep."""
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=16,
    )
    pipe = LuminaPipeline(lively(transformer), _static(), image_vae(4), None, None)
    masks = {f"{sign}prompt_attention_mask": torch.ones(2, 5) for sign in ("", "negative_")}
    return small(pipe, negative_prompt=None, **prompts(_BOTH), **masks)


def ernie_image() -> Small:
    """Latents are drawn in the call itself; unequal prompts in lists; the loop reads an output object of `step`."""
    transformer = ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
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
    pipe = ErnieImagePipeline(lively(transformer), vae.eval(), None, None, FlowMatchEulerDiscreteScheduler())
    sides = prompts(dict.fromkeys(_BOTH, (5, 16)))
    return small(pipe, **{name: [side, side[:3]] for name, side in sides.items()})


def flux_controlnet() -> Small:
    """A second network's hidden states go into the transformer."""
    net = FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=[2, 2, 4],
    )
    return small(FluxControlNetPipeline(*flux_parts(), lively(net, 1)), control_image=PHOTO, **prompts(FLUX_PROMPTS))


def krea2() -> Small:
    """Several layers of the text encoder; guidance as c + s (c - u)."""
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = Krea2Pipeline(scheduler, qwen_vae(), None, None, lively(transformer), text_encoder_select_layers=(0, 1))
    masks = {f"{sign}prompt_embeds_mask": torch.ones(2, 5).bool() for sign in ("", "negative_")}
    return small(pipe, **prompts(dict.fromkeys(_BOTH, (2, 5, 2, 16))), **masks)


def prx_pixel() -> Small:
    """No decoder: x_0 is the image; the model predicts it, and the loop makes a velocity of that."""
    transformer = PRXTransformer2DModel(
        in_channels=3, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[4, 4]
    )
    masks = {f"{sign}prompt_attention_mask": torch.ones(1, 5).bool() for sign in ("", "negative_")}
    pipe = PRXPixelPipeline(lively(transformer), _static(), None, None)
    return small(pipe, negative_prompt=None, use_resolution_binning=False, **prompts(ONE), **masks)


def skyreels() -> Small:
    """UniPC with flow sigmas; two calls a step."""
    transformer = SkyReelsV2Transformer3DModel(num_layers=1, **WAN)
    pipe = SkyReelsV2Pipeline(None, None, lively(transformer), wan_vae(), unipc())
    return small(pipe, num_frames=5, **prompts(ONE))


def wan_vace() -> Small:
    """Control layers inside the transformer, fed with an encoded video and a mask."""
    transformer = WanVACETransformer3DModel(num_layers=2, vace_layers=[0], vace_in_channels=72, **WAN)
    pipe = WanVACEPipeline(None, None, wan_vae(), unipc(), lively(transformer))
    return small(pipe, num_frames=5, **prompts(ONE))


def hunyuan_video_15() -> Small:
    """Guidance by an object that keeps state; two encodings a prompt."""
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(16,) * 5, layers_per_block=1).eval()
    parts = (None, None, lively(transformer), vae, FlowMatchEulerDiscreteScheduler(shift=5.0), None, None)
    pipe = HunyuanVideo15Pipeline(*parts, ClassifierFreeGuidance(guidance_scale=4.0))
    pipe.vision_num_semantic_tokens, pipe.vision_states_dim = 2, 8
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (1, 4, 16), "prompt_embeds_2": (1, 3, 8)}
    masks = {name.replace("embeds", "embeds_mask"): torch.ones(shape[:2]) for name, shape in shapes.items()}
    negative = {f"negative_{name}": shape for name, shape in shapes.items()}
    masks |= {f"negative_{name}": mask for name, mask in masks.items()}
    return small(pipe, height=32, width=32, num_frames=5, **prompts(shapes | negative), **masks)


BUILDERS = {
    "Flux ControlNet": flux_controlnet,
    "Lumina": lumina,
    "Ernie-Image": ernie_image,
    "Krea 2": krea2,
    "PRX, pixels": prx_pixel,
    "SkyReels V2": skyreels,
    "Wan VACE": wan_vace,
    "HunyuanVideo 1.5": hunyuan_video_15,
}
