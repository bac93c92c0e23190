"""Pipelines of diffusers that `operate` can't follow are refused early; images without a plan are unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
)
from PIL import Image

from tests.builders.pipelines.every import BUILDERS
from tests.builders.pipelines.flux import flux2_parts
from tests.builders.pipelines.newer import ONE, WAN
from tests.builders.pipelines.parts import Small, lively, prompts, small, wan_vae
from tests.builders.pipelines.video import unipc
from trajsurgery import SamplerError, leapalign, operate


def klein_kv() -> Small:
    """Later calls attend to the photograph's keys and values of the first call."""
    photo = Image.new("RGB", (64, 64), (200, 30, 40))
    return small(Flux2KleinKVPipeline(*flux2_parts(False)), image=photo, **prompts({"prompt_embeds": (1, 5, 12)}))


def cached_flux() -> Small:
    """Blocks are skipped where the first block's output is near the last step's."""
    flux = BUILDERS["Flux"]()
    flux.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    return flux


def diffusion_forcing() -> Small:
    """Each frame has its scheduler and its time."""
    transformer = lively(SkyReelsV2Transformer3DModel(num_layers=1, **WAN))
    pipe = SkyReelsV2DiffusionForcingPipeline(None, None, transformer, wan_vae(), unipc())
    return small(pipe, prompt=None, num_frames=5, ar_step=1, causal_block_size=1, **prompts(ONE))


class Unguarded:
    """A stand-in for the safety checker, which is not installed."""

    def to(self, *_: Any) -> Unguarded:
        return self

    def check_text_safety(self, _: Any) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos2() -> Small:
    """EDM's sigmas, from 80 down, on the flow-matching Euler class."""
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    pipe = Cosmos2TextToImagePipeline(None, None, lively(transformer), wan_vae(), scheduler, Unguarded())
    return small(pipe, torch.float32, **prompts(ONE))


@pytest.mark.parametrize(
    "build, message",
    [
        (klein_kv, r"share a Flux2KVCache: .* Switch it off"),
        (cached_flux, r"the cache of FluxTransformer2DModel\.enable_cache\(\)"),
        (diffusion_forcing, "steps copies of the scheduler"),
        (cosmos2, r"from 80 to 0\.002; a flow-matching sampler.s times lie in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("memory", ["retain", "recompute"])
def test_the_pipeline_is_refused_by_the_second_step(build: Any, message: str, memory: Any) -> None:
    refused, count = build(), [0]
    refused.pipe.transformer.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with pytest.raises(SamplerError, match=message), operate(refused.pipe, leapalign(4, 1), memory):
        refused()
    assert count[0] <= 4  # two steps of two calls
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("build", [klein_kv, cached_flux])
def test_a_rollout_without_a_plan_is_recorded(build: Any) -> None:
    """Its latents are right; only the velocity field is refused."""
    cached = build()
    plain = cached()[0]
    with operate(cached.pipe) as surgery:
        assert torch.equal(cached()[0], plain)
    trajectory = surgery.trajectory
    assert trajectory.steps == 4
    with pytest.raises(SamplerError, match=r"cache|Cache"):
        surgery.field(trajectory[2], trajectory.sigma(2))
