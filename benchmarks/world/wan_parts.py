"""The tiny Wan's untrained parts: real diffusers and transformers classes at a small size."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.world.tokenizers import t5_tokenizer
from trajsurgery.tiny.pipe import limit_prompt_length
from trajsurgery.tiny.video import every_motion

LATENT_CHANNELS = 8
WIDTH = 96  # of the transformer
TEXT_WIDTH = 64
TEXT_LENGTH = 8  # tokens; a prompt has five words and an end
PATCH = 2  # pixels
SPACE, TIME = 4, 2  # what the autoencoder divides height and width by, and the number of frames but the first


def vae() -> Any:
    """Return an AutoencoderKLWan, videos Float[batch 3 5 32 32] in [-1, 1] to latents Float[batch 8 3 8 8].

    As Wan 2.2's it works on patches of pixels, which is four times as fast at this size. It starts as an autoencoder of
    single frames, see `inflate`.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_spatial=SPACE,
        scale_factor_temporal=TIME,
    )
    inflate(model)
    return model


@torch.no_grad()
def inflate(model: nn.Module) -> None:
    """Make each convolution use the last of its frames alone, so that what single frames teach holds for videos.

    Of two frames that become one latent the mean is taken; one latent becomes two equal frames.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    for name, module in model.named_modules():
        if not isinstance(module, WanCausalConv3d) or module.weight.shape[2] != 3:
            continue
        weight = module.weight
        if not name.endswith("time_conv"):
            weight[:, :, :-1] = 0
            weight[:, :, -1] *= 3**0.5  # the scale of a convolution over one frame
            continue
        copies = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
        weight.zero_()
        weight[:, :, -1, 0, 0] = copies
        if len(weight) == weight.shape[1]:
            weight[:, :, -2:, 0, 0] = 0.5 * copies[..., None]
        if module.bias is not None:
            module.bias.zero_()


def transformer() -> Any:
    """Return a WanTransformer3DModel of half a million parameters whose output starts at zero."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=3 * WIDTH,
        num_layers=3,
        rope_max_seq_len=32,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def umt5_text(vocabulary: int) -> Any:
    """Return a UMT5EncoderModel of two layers, without dropout."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=TEXT_LENGTH,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def scheduler() -> Any:
    """Return UniPC on flow sigmas, as Wan ships, unshifted: so small a video has no more to decide early than late."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)


def words() -> list[str]:
    """Return every word of the video world's prompts, sorted."""
    return sorted({word for motion in every_motion() for word in motion.text.split()})


def untrained(folder: Path, autoencoder: Any) -> Any:
    """Return a WanPipeline around the autoencoder; its tokenizer's files are written to the folder."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    tokenizer = t5_tokenizer(folder / "tokenizer", words(), TEXT_LENGTH)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5_text(len(tokenizer)),
        vae=autoencoder,
        scheduler=scheduler(),
        transformer=transformer(),
    )
    return limit_prompt_length(pipe)
