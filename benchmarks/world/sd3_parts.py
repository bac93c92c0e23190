"""The tiny Stable Diffusion 3's untrained transformer, and how it is saved."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from benchmarks.world.flux_parts import WIDTH
from trajsurgery.tiny.pipe import LATENT_CHANNELS, LATENT_SIDE, TEXT_WIDTH
from trajsurgery.tiny.sd3 import trained_on, unused_weights


def transformer() -> Any:
    """Return an SD3Transformer2DModel of about a million parameters whose output and modulation start at zero."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIDE // 2,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        modulates = isinstance(module, nn.Linear) and name.endswith(".linear") and "norm" in name
        if modulates or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def save(pipe: Any, flux: Path, folder: Path) -> None:
    """Write the transformer in bfloat16 without its unused weights, and the hashes of its text encoders."""
    model, file = pipe.transformer.to(torch.bfloat16), folder / "transformer" / SAFETENSORS_WEIGHTS_NAME
    model.save_config(file.parent)
    unused = unused_weights(model)
    save_file({name: value.contiguous() for name, value in model.state_dict().items() if name not in unused}, file)
    (folder / "trained_on.json").write_text(json.dumps(trained_on(flux), indent=1) + "\n")
