"""Pipelines of videos: latents with a time axis."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)

from tests.builders.pipelines.parts import Small, lively, prompts, small, wan_vae

_BOTH = {"prompt_embeds": (1, 4, 16), "negative_prompt_embeds": (1, 4, 16)}
_MASKS = {"prompt_attention_mask": torch.ones(1, 4), "negative_prompt_attention_mask": torch.ones(1, 4)}
_PHOTO = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def wan_transformer(seed: int = 0, **changes: Any) -> Any:
    """A Wan transformer of one block."""
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 16}
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "rope_max_seq_len": 32, "freq_dim": 16}
    return lively(WanTransformer3DModel(**sizes | shape | changes), seed)


def unipc() -> UniPCMultistepScheduler:
    """Wan's default sampler: UniPC with flow sigmas."""
    return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


def wan() -> Small:
    """Two calls a step, UniPC."""
    return small(WanPipeline(None, None, wan_vae(), unipc(), wan_transformer()), num_frames=5, **prompts(_BOTH))


def wan_22() -> Small:
    """Two transformers: one above the boundary of sigma, one below."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    two = {"transformer_2": wan_transformer(1), "boundary_ratio": 0.7}
    pipe = WanPipeline(None, None, wan_vae(), scheduler, wan_transformer(), **two)
    return small(pipe, num_frames=5, **prompts(_BOTH))


def wan_i2v() -> Small:
    """The first frame's latents stand beside the sample's in the model's input."""
    parts = {"transformer": wan_transformer(in_channels=12), "image_encoder": None, "image_processor": None}
    pipe = WanImageToVideoPipeline(None, None, wan_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    return small(pipe, image=_PHOTO, num_frames=5, **prompts(_BOTH))


def wan_v2v() -> Small:
    """The last two of four steps, without a `set_begin_index`."""
    pipe = WanVideoToVideoPipeline(None, None, wan_transformer(), wan_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    film = _PHOTO[None].expand(1, 5, -1, -1, -1)
    return small(pipe, video=film, strength=0.5, **prompts(_BOTH))


def _ltx_parts() -> tuple[Any, ...]:
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(4, 4),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae.eval(), None, None, lively(transformer)


def ltx() -> Small:
    """Packed latents; masked prompts."""
    return small(LTXPipeline(*_ltx_parts()), num_frames=5, height=32, width=32, **prompts(_BOTH), **_MASKS)


def ltx_i2v() -> Small:
    """`step` gets the latents without their first frame."""
    photo = torch.nn.functional.interpolate(_PHOTO, (32, 32))
    pipe = LTXImageToVideoPipeline(*_ltx_parts())
    return small(pipe, image=photo, num_frames=5, height=32, width=32, **prompts(_BOTH), **_MASKS)


def mochi() -> Small:
    """Sigmas run from 0 to 1; guidance and sampling in float32."""
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=4,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        add_attention_block=(False,) * 5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = MochiPipeline(scheduler, vae.eval(), None, None, lively(transformer))
    masks = {name: mask.bool() for name, mask in _MASKS.items()}
    return small(pipe, torch.float32, num_frames=7, **prompts(_BOTH), **masks)


def hunyuan_video_vae(channels: int = 4) -> Any:
    """A VAE of videos with 8 pixels and 4 frames a latent."""
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()


def hunyuan_video() -> Small:
    """Guidance is an input; masked prompts."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoPipeline(None, None, lively(transformer), hunyuan_video_vae(), scheduler, None, None)
    embeds = prompts({"prompt_embeds": (1, 4, 16), "pooled_prompt_embeds": (1, 8)})
    return small(pipe, num_frames=5, prompt_attention_mask=torch.ones(1, 4), **embeds)


def kandinsky5() -> Small:
    """Channels last; two calls a step."""
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = Kandinsky5T2VPipeline(lively(transformer), hunyuan_video_vae(), None, None, None, None, scheduler)
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds_qwen": (1, 4, 16), "prompt_embeds_clip": (1, 8)}
    embeds = prompts(shapes | {f"negative_{name}": shape for name, shape in shapes.items()})
    ends = {f"{sign}prompt_cu_seqlens": torch.tensor([0, 4], dtype=torch.int32) for sign in ("", "negative_")}
    return small(pipe, torch.float32, num_frames=5, **embeds, **ends)


def sana_video() -> Small:
    """DPM-Solver++ with flow sigmas, its default sampler."""
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        rope_max_seq_len=32,
    )
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    pipe = SanaVideoPipeline(None, None, wan_vae(), lively(transformer), scheduler)
    plain = {"negative_prompt": None, "use_resolution_binning": False, "frames": 5, "height": 32, "width": 32}
    return small(pipe, **plain, **prompts(_BOTH), **_MASKS)


BUILDERS = {
    "Wan": wan,
    "Wan 2.2": wan_22,
    "Wan image-to-video": wan_i2v,
    "Wan video-to-video": wan_v2v,
    "LTX": ltx,
    "LTX image-to-video": ltx_i2v,
    "Mochi": mochi,
    "HunyuanVideo": hunyuan_video,
    "Kandinsky 5": kandinsky5,
    "SanaVideo": sana_video,
}
