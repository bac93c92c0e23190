"""Pipelines that no code of the library names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.builders.small_pipelines import Small
from trajsurgery import draft_lv, drtune, leapalign, operate
from trajsurgery.plans.plan import Plan

STEPS = 5


def wan(scheduler: Any) -> Small:
    """Video: latents with a time axis, classifier-free guidance in two calls."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32
    )
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = WanPipeline(None, None, vae, scheduler, transformer)
    arguments = {
        "prompt_embeds": torch.randn(1, 4, 16),
        "negative_prompt_embeds": torch.randn(1, 4, 16),
        "num_frames": 5,
    }
    return Small(pipe, arguments | {"height": 16, "width": 16, "output_type": "pt", "num_inference_steps": STEPS})


def auraflow() -> Small:
    """One batched call for both sides of the guidance; the model's timestep lies in [0, 1]."""
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=32)
    pipe = AuraFlowPipeline(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler())
    embeddings = {f"{sign}prompt_embeds": torch.randn(1, 4, 16) for sign in ("", "negative_")}
    masks = {f"{sign}prompt_attention_mask": torch.ones(1, 4) for sign in ("", "negative_")}
    return Small(
        pipe, embeddings | masks | {"height": 16, "width": 16, "output_type": "pt", "num_inference_steps": STEPS}
    )


OTHERS = {
    "wan": lambda: wan(FlowMatchEulerDiscreteScheduler(shift=5.0)),
    "wan-unipc": lambda: wan(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")),
    "auraflow": auraflow,
}


@pytest.mark.parametrize(
    "plan", [leapalign(4, 2), drtune(STEPS, 2, {STEPS, 3}), draft_lv(1)], ids=["leapalign", "drtune", "draft_lv"]
)
@pytest.mark.parametrize("name", OTHERS)
def test_an_unknown_pipeline_is_exact_and_replayed(name: str, plan: Plan) -> None:
    torch.set_num_threads(1)
    small = OTHERS[name]()
    small.pipe.set_progress_bar_config(disable=True)
    plain = small()[0]
    by_memory: dict[str, Any] = {}
    for memory in ("retain", "recompute"):
        with operate(small.pipe, plan, memory, generator=torch.Generator().manual_seed(0)) as surgery:
            images = small()[0]
        assert not plan.exact or torch.equal(images, plain)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(output) for output in surgery.outputs]
        params = list(small.pipe.transformer.parameters())
        by_memory[memory] = torch.autograd.grad(surgery.outputs, params, cotangents)
    for retained, recomputed in zip(by_memory["retain"], by_memory["recompute"], strict=True):
        assert bool(retained.any())
        torch.testing.assert_close(recomputed, retained, rtol=1e-4, atol=1e-6)
    trajectory = surgery.trajectory
    for t in range(1, STEPS + 1):
        assert torch.equal(surgery.field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [STEPS, 25])
@pytest.mark.parametrize("name, euler", [("wan-unipc", False), ("wan", True)])
def test_euler_steps_are_distinguished_from_other_samplers(
    name: str, euler: bool, dtype: torch.dtype, steps: int
) -> None:
    """In bfloat16 the corrections of a multistep sampler were mistaken for rounding."""
    torch.set_num_threads(1)
    small = OTHERS[name]()
    small.pipe.set_progress_bar_config(disable=True)
    small.pipe.transformer.to(dtype)
    embeds = {n: v.to(dtype) for n, v in small.arguments.items() if n.endswith("embeds")}
    with operate(small.pipe) as surgery:
        small(**embeds, num_inference_steps=steps)
    is_step = [surgery.trajectory.is_step(t) for t in range(1, steps + 1)]
    assert is_step == ([True] * steps if euler else [t in (1, steps) for t in range(1, steps + 1)])
