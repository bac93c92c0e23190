"""The tiny Stable Diffusion 3: its own transformer with real guidance; everything else is the tiny Flux's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from trajsurgery.errors import RecipeError
from trajsurgery.tiny.pipe import FOLDERS, TEXT_WIDTH, WEIGHTS, limit_prompt_length

GUIDANCE = 1.5  # of the pipeline's calls: leaves bindings head-room on validation and on training prompts


def with_projection(clip: Any) -> Any:
    """Return the tiny Flux's CLIP as SD3 needs it: a CLIPTextModelWithProjection, the projection the identity."""
    from transformers import CLIPTextModelWithProjection

    clip.config.projection_dim = TEXT_WIDTH
    model: Any = CLIPTextModelWithProjection(clip.config)
    weights = {f"text_model.{name.removeprefix('text_model.')}": p for name, p in clip.state_dict().items()}
    model.load_state_dict({**weights, "text_projection.weight": torch.eye(TEXT_WIDTH)})
    return model


def assemble_pipeline(flux: Path, vae: Any, model: Any) -> Any:
    """Build a StableDiffusion3Pipeline from this autoencoder and transformer and the tiny Flux's frozen text encoders.

    Both its CLIPs are Flux's. The pipeline pads their joined states to the width of T5's, which here is that of one
    CLIP: it cuts the second off, of which only the pooled state is used.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    parts: Any = DiffusionPipeline.from_pretrained(flux, transformer=None, vae=None, dtype=torch.float32)
    pipe: Any = StableDiffusion3Pipeline(
        transformer=model,
        scheduler=parts.scheduler,
        vae=vae,
        text_encoder=with_projection(parts.text_encoder),
        tokenizer=parts.tokenizer,
        text_encoder_2=with_projection(parts.text_encoder),
        tokenizer_2=parts.tokenizer,
        text_encoder_3=parts.text_encoder_2,
        tokenizer_3=parts.tokenizer_2,
    )
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipe, name).requires_grad_(False).eval()
    return limit_prompt_length(pipe)


def trained_on(flux: Path) -> dict[str, str]:
    """Return the hashes of the weights shared with a Flux; with other weights the SD3 draws nonsense."""
    shared = sorted(file for part in ("text_encoder", "text_encoder_2") for file in (flux / part).glob("*.safetensors"))
    return {str(file.relative_to(flux)): hashlib.sha256(file.read_bytes()).hexdigest() for file in shared}


def unused_weights(model: Any) -> set[str]:
    """Return the names of weights that no output depends on: the last block discards its text."""
    attention = f"transformer_blocks.{len(model.transformer_blocks) - 1}.attn."
    return {name for name in model.state_dict() if name.startswith((attention + "add_q_", attention + "norm_added_q"))}


def pipeline(folder: Path = FOLDERS["sd3"], flux: Path = WEIGHTS) -> Any:
    """Load the shipped StableDiffusion3Pipeline, float32; see `trajsurgery.tiny.pipeline`.

    Only its transformer is stored; the other parts are those of the Flux in the package. `pipe.save_pretrained` writes
    a folder that diffusers loads by itself.

    Raises RecipeError if the Flux's text encoders are not those it was trained with.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    if json.loads((folder / "trained_on.json").read_text()) != trained_on(flux):
        raise RecipeError(
            f"the tiny SD3 in {folder} was trained with other text encoders than those in {flux}: train it again with "
            "`python -m benchmarks.world.train --stage sd3`."
        )
    file = folder / "transformer" / SAFETENSORS_WEIGHTS_NAME
    config: Any = SD3Transformer2DModel.load_config(file.parent)
    model: Any = SD3Transformer2DModel.from_config(config)
    initial = model.state_dict()
    model.load_state_dict(
        {**{name: torch.zeros_like(initial[name]) for name in unused_weights(model)}, **load_file(file)}
    )
    vae: Any = AutoencoderKL.from_pretrained(flux / "vae", dtype=torch.float32)
    return assemble_pipeline(flux, vae, model)
