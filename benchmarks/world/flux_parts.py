"""The tiny Flux's untrained parts: real diffusers and transformers classes at a small size."""

from typing import Any

import torch
from torch import nn

from trajsurgery.tiny.pipe import LATENT_CHANNELS, LATENT_SIDE, TEXT_LENGTH, TEXT_WIDTH, TOKENS
from trajsurgery.tiny.scene import SIDE

WIDTH = 96  # of the transformer
SHIFT = 1.0  # the scheduler's static shift: sigmas fall evenly from 1 to 0


def vae() -> Any:
    """Return an AutoencoderKL, images Float[batch 3 32 32] in [-1, 1] to latents Float[batch 4 8 8]."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    # Its annotations say tuples of one.
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 64),
    }
    return AutoencoderKL(
        **levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def transformer() -> Any:
    """Return a FluxTransformer2DModel of about a million parameters whose output and modulation start at zero."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        modulates = isinstance(module, nn.Linear) and name.endswith(".linear") and "norm" in name
        if modulates or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def clip_text(vocabulary: int, end: int) -> Any:
    """Return a CLIPTextModel of two layers. `end` is the token whose state is the pooled embedding."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def t5_text(vocabulary: int) -> Any:
    """Return a T5EncoderModel of three layers, without dropout."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=4 * TEXT_WIDTH,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=TEXT_LENGTH,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def scheduler() -> Any:
    """Return a FlowMatchEulerDiscreteScheduler with a static shift."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack Float[batch 4 8 8] latents to the Float[batch 16 16] tokens of Flux, as FluxPipeline does."""
    batch, side = latents.shape[0], LATENT_SIDE // 2
    blocks = latents.view(batch, LATENT_CHANNELS, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, TOKENS, 4 * LATENT_CHANNELS)


def image_ids() -> torch.Tensor:
    """Return Float[16 3], the places of the image tokens for the rotary embedding, as FluxPipeline numbers them."""
    place = torch.arange(TOKENS)
    side = LATENT_SIDE // 2
    return torch.stack([torch.zeros_like(place), place // side, place % side], -1).float()
