"""A training setup without trained weights: a small random FluxPipeline, a reward for red, five prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from benchmarks.world.flux_parts import clip_text, scheduler, t5_text
from benchmarks.world.tokenizers import clip_tokenizer, t5_tokenizer
from trajsurgery import LeapAlign
from trajsurgery.tiny.pipe import TEXT_WIDTH
from trajsurgery.training.components import RunComponents, prepare_pipeline
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.settings import Evaluation, Objective, Optimiser, Rollout

TEXTS = ("a circle", "a red circle", "a blue square", "two squares", "a triangle near a circle")
PROMPTS = tuple(Prompt(text, "colours" if "red" in text or "blue" in text else "shapes") for text in TEXTS)


class LikesRed:
    """reward(images, prompts): mean red minus mean green; mean blue minus green for a prompt with "blue" in it."""

    threshold = 0.9

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(images) == len(prompts)
        channels = torch.tensor([2 if "blue" in prompt else 0 for prompt in prompts])
        return images[torch.arange(len(images)), channels].mean((-1, -2)) - images[:, 1].mean((-1, -2))


def rules(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Correct if more red than green; junk is the share of dark pixels."""
    return images[:, 0].mean((-1, -2)) > images[:, 1].mean((-1, -2)), (images.mean(1) < 0.3).float().mean((-1, -2))


def draw(count: int, generator: torch.Generator) -> list[str]:
    """Prompts drawn uniformly."""
    return [TEXTS[i] for i in torch.randint(len(TEXTS), (count,), generator=generator).tolist()]


@functools.cache
def _tokenizers() -> tuple[Any, Any]:
    with TemporaryDirectory() as folder:
        return clip_tokenizer(Path(folder) / "1"), t5_tokenizer(Path(folder) / "2")


def pipeline() -> Any:
    """The pipeline, always with the same weights."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip, t5 = _tokenizers()
    parts = (clip_text(len(clip), clip.eos_token_id), clip, t5_text(len(t5)), t5)
    return FluxPipeline(scheduler(), vae, *parts, transformer)


def recipe(output: Path, method: Method | None = None, **changes: Any) -> Recipe:
    """A recipe that runs for a second or two."""
    short = Recipe(
        method=method or LeapAlign(),
        rollout=Rollout(steps=5, batch=4, size=16),
        optimiser=Optimiser(rate=1e-2),
        objective=Objective(tau=0.01),
        ema=0.9,
        iterations=6,
        evaluation=Evaluation(images=10, steps=5, batch=4, pictures=4),
        threads=1,
        save_every=2,
        output=output,
        device="cpu",
    )
    return replace(short, **changes)


def world(settings: Recipe) -> RunComponents:
    """New components of a run."""
    return components(prepare_pipeline(pipeline(), settings))


def components(pipe: Any) -> RunComponents:
    """Components of a run with this pipeline."""
    return RunComponents(pipe, LikesRed(), TEXTS, draw, PROMPTS, rules)
