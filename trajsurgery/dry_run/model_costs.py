"""Costs of a recipe's model call, decode and reward, measured under fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trajsurgery.dry_run.fake_pipeline import FakePipeline, PipelineSpec, build_model, build_pipeline, latents
from trajsurgery.dry_run.measure import MeasuredWork, measure
from trajsurgery.training.model import lora, precision, vae_decoding
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


class Measurements:
    """Measurements by what they depend on, each made once for all recipes that share it."""

    def __init__(self) -> None:
        self._results = dict[str, Any]()

    def once(self, key: object, work: Callable[[], Any]) -> Any:
        """Return the result of `work`, from an earlier call with an equal key if there was one."""
        name = repr(key)
        if name not in self._results:
            self._results[name] = work()
        return self._results[name]


def measure_model(
    recipe: Recipe, spec: PipelineSpec, images: int, sharded: bool, measurements: Measurements | None = None
) -> ModelCosts:
    """Build the model for `images` at once and measure a step's calls, the decode and the reward.

    Args:
        sharded: whether FSDP gathers the weights, in the recipe's precision.
        measurements: those of other recipes on the same spec and kernels.
    """
    rollout, once = recipe.rollout, (measurements or Measurements()).once
    half, dtype = rollout.precision == "bfloat16", precision.kept_dtype(recipe)
    autocast = half and dtype == torch.float32
    if half and sharded:
        dtype = torch.bfloat16
    inputs = images, rollout.shape, rollout.frames, rollout.guidance
    adapters = (recipe.train.what, recipe.train.rank, recipe.train.targets, recipe.train.pattern)
    model, call = once(
        ("call", *inputs, dtype, autocast, rollout.checkpointing, adapters),
        lambda: _measure_call(recipe, build_pipeline(spec, rollout, images, dtype), autocast),
    )
    vae_dtype = vae_decoding.vae_dtype(model.pipe.vae, recipe.decoder, half)
    decode, pixels, decoder_bytes = once(
        ("decode", *inputs, replace(recipe.decoder, precision="auto", stay=False), vae_dtype),
        lambda: _measure_decode(recipe, spec, model, images),
    )
    reward, reward_bytes = once(("reward", recipe.reward, pixels), lambda: _reward(recipe.reward, pixels, model.mode))
    transformer: Any = model.transformer
    sizes = [sum(p.numel() for p in b.parameters()) for m in transformer.children() for b in _blocks(m)]
    loose = sum(p.numel() for p in transformer.parameters()) - sum(sizes)
    return ModelCosts(model, call, decode, reward, decoder_bytes, reward_bytes, max(sizes, default=0), loose)


def _measure_call(recipe: Recipe, model: FakePipeline, autocast: bool) -> tuple[FakePipeline, MeasuredWork]:
    transformer: Any = model.transformer
    with model.mode:
        lora.set_trainable_fake(transformer, recipe.train)
        if recipe.rollout.checkpointing:
            transformer.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model, measure(model.velocity, transformer.parameters(), model.chained)


def _measure_decode(
    recipe: Recipe, spec: PipelineSpec, model: FakePipeline, images: int
) -> tuple[MeasuredWork, tuple[int, ...], int]:
    """Return the decode's costs, the shape of the pictures, and the bytes of the VAE's weights."""
    z = latents(model, recipe.rollout, images).requires_grad_()
    with model.mode:
        vae = prepare_decoder(recipe, spec)
        decode = measure(lambda: [vae.decode(z).sample], vae.parameters())
        pixels = _pictures(vae.decode(z).sample.detach())
    return decode, tuple(pixels.shape), sum(p.numel() * p.element_size() for p in vae.parameters())


def prepare_decoder(recipe: Recipe, spec: PipelineSpec) -> Any:
    """Build the VAE as the recipe decodes with it, in the tensor mode that is active.

    Raises:
        RecipeError: it has no tiles, slices or gradient checkpointing.
    """
    half = recipe.rollout.precision == "bfloat16"
    vae = build_model(spec.vae, torch.float32)
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


def _reward(name: str, shape: tuple[int, ...], mode: FakeTensorMode) -> tuple[MeasuredWork | None, int]:
    """Measure HPSv2.1's gradient and weights on pictures of a shape; other rewards are not counted."""
    if name.partition(":")[0] != "hpsv2.1":
        return None, 0
    import open_clip

    from trajsurgery.rewards.hpsv2 import preprocess

    config: Any = open_clip.get_model_config("ViT-H-14")
    with mode:
        pixels = torch.empty(shape, dtype=torch.float32, requires_grad=True)  # as rewards take them
        clip: Any = open_clip.CLIP(**config)  # create_model moves it, which fake tensors do not allow
        clip.eval().requires_grad_(False)
        side = int(clip.visual.image_size[0])
        costs = measure(lambda: [clip.encode_image(preprocess(pixels, side), normalize=True)], clip.parameters())
    return costs, 4 * sum(p.numel() for p in clip.parameters())
