"""Loops that go on with other latents than they were given: callbacks, masks. x_t is what the model is called with."""

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


def scaled(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"latents": given["latents"] * 0.9} if step in CHANGED else {}


def scaled_without_gradient(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        return scaled(pipe, step, t, given)


def scaled_in_place(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step in CHANGED:
        with torch.no_grad():
            given["latents"].mul_(0.9)
    return {}


def copied(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"latents": given["latents"].clone()}


CALLBACKS: tuple[Callable[..., dict[str, Any]], ...] = (scaled, scaled_without_gradient, scaled_in_place, copied)

PLANS = {
    "leapalign": leapalign(5, 2),
    "leapalign-neighbours": leapalign(4, 3),
    "own-steps": Plan(latent(5).leap(4).leap(3).leap(0)),
    "drtune": drtune(STEPS, 2, {STEPS, 4, 3}),
}


def ways(small: Small, plan: Plan, **changes: Any) -> tuple[dict[str, Any], Any]:
    """Values of the output and gradients of the transformer under retain and recompute; the last surgery."""
    found: dict[str, Any] = {}
    for memory in ("retain", "recompute"):
        with operate(small.pipe, plan, memory) as surgery:
            images = small(**changes)[0]
        torch.manual_seed(1)
        cotangents = [torch.randn_like(output) for output in surgery.outputs]
        params = list(small.pipe.transformer.parameters())
        grads = torch.autograd.grad(surgery.outputs, params, cotangents, allow_unused=True, materialize_grads=True)
        found[memory] = surgery.outputs[0].detach(), grads, images
    return found, surgery


def agree(found: dict[str, Any]) -> None:
    (kept, retained, _), (made, recomputed, _) = found["retain"], found["recompute"]
    torch.testing.assert_close(made, kept, rtol=0, atol=0)
    assert any(bool(g.any()) for g in retained)
    for a, b in zip(recomputed, retained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_callback_changes_the_latents(name: str, callback: Any, plan: Plan) -> None:
    """The retained call went through the callback, and steps that it changed counted as the sampler's own."""
    torch.set_num_threads(1)
    small = PIPELINES[name](torch.float64)
    plain = small(callback_on_step_end=callback).images
    found, surgery = ways(small, plan, callback_on_step_end=callback)
    agree(found)
    assert not plan.exact or torch.equal(found["retain"][2], plain)
    trajectory = surgery.trajectory
    for t in range(1, STEPS + 1):
        assert torch.equal(surgery.field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t))
        assert trajectory.is_step(t) == (callback is copied or t == 1)
    assert torch.equal(apply(plan, trajectory, surgery.field), found["retain"][0])


def test_a_copy_costs_no_call() -> None:
    torch.set_num_threads(1)
    small, count = flux(), [0]
    small.pipe.transformer.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with operate(small.pipe, leapalign(5, 2)):
        small(callback_on_step_end=copied)
    assert count[0] == STEPS


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_mask_is_blended_in_after_every_step(plan: Plan) -> None:
    torch.set_num_threads(1)
    parts = flux(torch.float64)
    pipe = FluxInpaintPipeline(
        **{n: c for n, c in parts.pipe.components.items() if n != "image_encoder" and "feature" not in n}
    )
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1
    given = {"image": torch.rand(2, 3, 16, 16), "mask_image": mask, "strength": 1.0}
    small = Small(pipe, parts.arguments | given)
    plain = small().images
    found, surgery = ways(small, plan)
    agree(found)
    assert not plan.exact or torch.equal(found["retain"][2], plain)
    trajectory = surgery.trajectory
    assert not trajectory.is_step(4)
    for t in range(1, STEPS + 1):
        assert torch.equal(surgery.field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t)), f"at t = {t}"
