"""Costs of a recipe's model call, decode and reward, measured under fake tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.dry_run.fake_pipeline import FakePipeline, PipelineSpec, build_model, build_pipeline, latents
from trajsurgery.dry_run.measure import MeasuredWork, measure
from trajsurgery.training import lora, precision, vae_decoding
from trajsurgery.training.recipe import Recipe


@dataclass(frozen=True)
class ModelCosts:
    """A pipeline's costs at one precision and number of images."""

    model: FakePipeline
    call: MeasuredWork
    decode: MeasuredWork
    reward: MeasuredWork | None
    decoder_bytes: int
    """Bytes of the VAE's weights."""
    reward_bytes: int
    block: int
    """Parameters of the largest block, which FSDP gathers."""
    loose: int
    """Parameters outside the blocks."""


def measure_model(recipe: Recipe, spec: PipelineSpec, images: int, sharded: bool) -> ModelCosts:
    """Build the model for `images` at once and measure a step's calls, the decode and the reward.

    Args:
        sharded: whether FSDP gathers the weights, in the recipe's precision.
    """
    rollout = recipe.rollout
    half, dtype = rollout.precision == "bfloat16", precision.kept_dtype(recipe)
    autocast = half and dtype == torch.float32
    if half and sharded:
        dtype = torch.bfloat16
    model = build_pipeline(spec, rollout, images, dtype)
    transformer: Any = model.transformer
    with model.mode:
        lora.set_trainable_fake(transformer, recipe.train)
        if rollout.checkpointing:
            transformer.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            call = measure(model.velocity, transformer.parameters(), model.chained)
    z = latents(model, rollout, images).requires_grad_()
    with model.mode:
        vae = _decoder(recipe, spec, model)
        decode = measure(lambda: [vae.decode(z).sample], vae.parameters())
        pixels = _pictures(vae.decode(z).sample.detach()).float().requires_grad_()  # as rewards take them
        reward, size = _reward(recipe.reward, pixels)
    weights = sum(p.numel() * p.element_size() for p in vae.parameters())
    sizes = [sum(p.numel() for p in b.parameters()) for m in transformer.children() for b in _blocks(m)]
    loose = sum(p.numel() for p in transformer.parameters()) - sum(sizes)
    return ModelCosts(model, call, decode, reward, weights, size, max(sizes, default=0), loose)


def _decoder(recipe: Recipe, spec: PipelineSpec, model: FakePipeline) -> Any:
    """Build the VAE as the recipe decodes with it."""
    vae, half = model.pipe.vae, recipe.rollout.precision == "bfloat16"
    dtype = vae_decoding.vae_dtype(vae, recipe.decoder, half)
    if dtype != torch.float32:  # `to` fails on fake parameters
        vae = build_model(spec.vae, dtype)
    vae_decoding.prepare_vae(vae, replace(recipe.decoder, compile=False), half)  # torch compiles no fake tensors
    return vae


def _pictures(pixels: Tensor) -> Tensor:
    """Return the decode as [batch, 3, h, w]; each frame of a video is one picture."""
    return pixels if pixels.dim() == 4 else pixels.movedim(2, 1).flatten(0, 1)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else []


def _reward(name: str, pixels: Tensor) -> tuple[MeasuredWork | None, int]:
    """Measure HPSv2.1's gradient and weights; other rewards are not counted."""
    if name.partition(":")[0] != "hpsv2.1":
        return None, 0
    import open_clip

    from trajsurgery.rewards.hpsv2 import preprocess

    config: Any = open_clip.get_model_config("ViT-H-14")
    clip: Any = open_clip.CLIP(**config)  # create_model moves it, which fake tensors do not allow
    clip.eval().requires_grad_(False)
    side = int(clip.visual.image_size[0])
    costs = measure(lambda: [clip.encode_image(preprocess(pixels, side), normalize=True)], clip.parameters())
    return costs, 4 * sum(p.numel() for p in clip.parameters())
