"""Loops that change the latents between steps (callbacks, masks): x_t is the latent that the model is called on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxInpaintPipeline

from tests.builders.small_pipelines import PIPELINES, Small, flux
from trajsurgery import apply, drtune, latent, leapalign, operate
from trajsurgery.plans.plan import Plan

STEPS = 6
CHANGED = (0, 1, 2, 3, 4)
"""The steps after which the latents are changed."""


def scaled(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.9} if step in CHANGED else {}


def scaled_without_gradient(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        return scaled(pipe, step, t, tensors)


def scaled_in_place(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step in CHANGED:
        with torch.no_grad():
            tensors["latents"].mul_(0.9)
    return {}


def copied(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"].clone()}


CALLBACKS: tuple[Callable[..., dict[str, Any]], ...] = (scaled, scaled_without_gradient, scaled_in_place, copied)

PLANS = {
    "leapalign": leapalign(5, 2),
    "leapalign-neighbours": leapalign(4, 3),
    "own-steps": Plan(latent(5).leap(4).leap(3).leap(0)),
    "drtune": drtune(STEPS, 2, {STEPS, 4, 3}),
}


def ways(small: Small, plan: Plan, **changes: Any) -> tuple[dict[str, Any], Any]:
    """Output, gradients and images under retain and recompute, by name; the last surgery."""
    by_memory: dict[str, Any] = {}
    for memory in ("retain", "recompute"):
        with operate(small.pipe, plan, memory) as surgery:
            images = small(**changes)[0]
        torch.manual_seed(1)
        cotangents = [torch.randn_like(output) for output in surgery.outputs]
        params = list(small.pipe.transformer.parameters())
        grads = torch.autograd.grad(surgery.outputs, params, cotangents, allow_unused=True, materialize_grads=True)
        by_memory[memory] = surgery.outputs[0].detach(), grads, images
    return by_memory, surgery


def agree(by_memory: dict[str, Any]) -> None:
    (retained_output, retained, _), (recomputed_output, recomputed, _) = by_memory["retain"], by_memory["recompute"]
    torch.testing.assert_close(recomputed_output, retained_output, rtol=0, atol=0)
    assert any(bool(g.any()) for g in retained)
    for a, b in zip(recomputed, retained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_callback_may_change_the_latents(name: str, callback: Any, plan: Plan) -> None:
    """The retained call passed through the callback, and changed steps counted as the sampler's."""
    torch.set_num_threads(1)
    small = PIPELINES[name](torch.float64)
    plain = small(callback_on_step_end=callback).images
    by_memory, surgery = ways(small, plan, callback_on_step_end=callback)
    agree(by_memory)
    assert not plan.exact or torch.equal(by_memory["retain"][2], plain)
    trajectory = surgery.trajectory
    for t in range(1, STEPS + 1):
        assert torch.equal(surgery.field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t))
        assert trajectory.is_step(t) == (callback is copied or t == 1)
    assert torch.equal(apply(plan, trajectory, surgery.field), by_memory["retain"][0])


def test_a_callback_that_copies_the_latents_costs_no_call() -> None:
    torch.set_num_threads(1)
    small, count = flux(), [0]
    small.pipe.transformer.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with operate(small.pipe, leapalign(5, 2)):
        small(callback_on_step_end=copied)
    assert count[0] == STEPS


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_mask_may_be_blended_in_after_every_step(plan: Plan) -> None:
    torch.set_num_threads(1)
    parts = flux(torch.float64)
    pipe = FluxInpaintPipeline(
        **{n: c for n, c in parts.pipe.components.items() if n != "image_encoder" and "feature" not in n}
    )
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1
    changes = {"image": torch.rand(2, 3, 16, 16), "mask_image": mask, "strength": 1.0}
    small = Small(pipe, parts.arguments | changes)
    plain = small().images
    by_memory, surgery = ways(small, plan)
    agree(by_memory)
    assert not plan.exact or torch.equal(by_memory["retain"][2], plain)
    trajectory = surgery.trajectory
    assert not trajectory.is_step(4)
    for t in range(1, STEPS + 1):
        assert torch.equal(surgery.field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t)), f"at t = {t}"
