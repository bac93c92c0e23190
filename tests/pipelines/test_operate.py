"""`operate` on unmodified pipelines: outputs equal the plain call's bit for bit, gradients are the plan's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.builders.small_pipelines import PIPELINES, Small
from trajsurgery import (
    Surgery,
    backward,
    draft_lv,
    drtune,
    flowbp_sparse,
    latent,
    leapalign,
    leaps,
    noise,
    operate,
    refl,
)
from trajsurgery.plans.plan import Plan

STEPS = 6
PLANS = {
    "leapalign": leapalign(5, 2, 0.3),
    "leapalign-first": leapalign(STEPS, 1, 0.3),
    "three-leaps": leaps((STEPS, 4, 1), 0.5),
    "drtune": drtune(STEPS, 2, {STEPS, 4}),
    "refl": refl(3),
    "draft_lv": draft_lv(2),
    "two-discounts": Plan(*(latent(5).leap(2).connect().leap(0, discount=a).connect() for a in (0.2, 0.7))),
    "connector-after-prediction": Plan(latent(5).leap(3).leap(1).connect().leap(0).connect()),
}


@pytest.fixture(params=PIPELINES)
def small(request: pytest.FixtureRequest) -> Small:
    torch.set_num_threads(1)
    return PIPELINES[request.param](torch.float64)


def gradients(outputs: Any, small: Small, seed: int = 1) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random cotangents, and the gradients of the transformer's parameters for them."""
    torch.manual_seed(seed)
    cotangents = [torch.randn_like(output) for output in outputs]
    params = list(small.pipe.transformer.parameters())
    return cotangents, list(torch.autograd.grad(outputs, params, cotangents, retain_graph=True))


def reached(grads: list[torch.Tensor]) -> list[bool]:
    """Which parameters have a gradient other than zero (in SD3's last block some have none)."""
    return [bool(g.any()) for g in grads]


def plain_backpropagation(small: Small, surgery: Surgery) -> list[torch.Tensor]:
    """The transformer's gradients by plain backpropagation through the last step."""
    v = velocity(small, surgery.trajectory[1], surgery.trajectory.sigma(1))
    return gradients([v], small)[1]


def gap(actual: Any, expected: Any) -> float:
    """The largest relative difference of two gradients, parameter by parameter."""
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("memory", ["retain", "recompute", "split"])
def test_every_latent_and_image_equals_the_plain_call_s(name: str, dtype: torch.dtype, memory: Any) -> None:
    small = PIPELINES[name](dtype)
    latents: list[torch.Tensor] = []

    def record(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].detach().clone())
        return {}

    plain = small(callback_on_step_end=record).images
    rollout, latents = latents, []
    with operate(small.pipe, leapalign(5, 2), memory) as surgery:
        images = small(callback_on_step_end=record).images
    assert torch.equal(images, plain)
    assert all(torch.equal(a, b) for a, b in zip(latents, rollout, strict=True))
    assert all(torch.equal(surgery.trajectory[t], rollout[STEPS - 1 - t]) for t in range(STEPS))
    assert torch.equal(surgery.outputs[0], surgery.trajectory[0])
    assert images.requires_grad


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_all_ways_give_the_same_gradient(small: Small, plan: Plan) -> None:
    by_memory: dict[str, list[torch.Tensor]] = {}
    cotangents: list[torch.Tensor] = []
    for memory in ("retain", "recompute"):
        with operate(small.pipe, plan, memory, generator=torch.Generator().manual_seed(3)) as surgery:
            small()
        cotangents, by_memory[memory] = gradients(surgery.outputs, small)
    small.pipe.transformer.zero_grad()
    with operate(small.pipe, plan, "split", generator=torch.Generator().manual_seed(3)) as surgery:
        small()
    torch.autograd.backward(surgery.outputs, cotangents)
    split = [p.grad for p in small.pipe.transformer.parameters()]
    assert gap(split, by_memory["retain"]) < 1e-10
    small.pipe.transformer.zero_grad()
    backward(plan, surgery.trajectory, surgery.field, cotangents)
    staged = [p.grad for p in small.pipe.transformer.parameters()]
    assert reached(by_memory["retain"]) == reached(plain_backpropagation(small, surgery)), (
        "another set of parameters trains"
    )
    assert gap(by_memory["recompute"], by_memory["retain"]) < 1e-10
    assert gap(staged, by_memory["retain"]) < 1e-10


@pytest.mark.parametrize(
    "plan", [p for n, p in PLANS.items() if n != "draft_lv"], ids=[n for n in PLANS if n != "draft_lv"]
)
def test_the_gradient_is_the_closed_form(small: Small, plan: Plan) -> None:
    # Stock transformers cast to float32 inside (measured rounding: 1.2e-7).
    with operate(small.pipe, plan) as surgery:
        small()
    cotangents, actual = gradients(surgery.outputs, small)
    params = list(small.pipe.transformer.parameters())
    assert gap(actual, plan.gradient().evaluate(surgery.trajectory, surgery.field, cotangents, params)) < 1e-6


def velocity(small: Small, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The velocity after guidance, written from the model's documentation: one call for Flux, two for SD3."""
    arguments, transformer = small.arguments, small.pipe.transformer
    if "negative_prompt_embeds" not in arguments:
        ids = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(16, 2)
        return transformer(
            hidden_states=x,
            timestep=(sigma * 1000).to(x.dtype).expand(len(x)) / 1000,
            guidance=torch.full([len(x)], arguments["guidance_scale"]),
            pooled_projections=arguments["pooled_prompt_embeds"],
            encoder_hidden_states=arguments["prompt_embeds"],
            txt_ids=torch.zeros(5, 3, dtype=x.dtype),
            img_ids=torch.nn.functional.pad(ids, (1, 0)).to(x.dtype),
            return_dict=False,
        )[0]
    sides = [
        transformer(
            hidden_states=x,
            timestep=(sigma * 1000).expand(len(x)),
            encoder_hidden_states=arguments[prefix + "prompt_embeds"],
            pooled_projections=arguments[prefix.replace("prompt", "") + "pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        for prefix in ("negative_", "")
    ]
    return sides[0] + arguments["guidance_scale"] * (sides[1] - sides[0])


@pytest.mark.parametrize("k, j", [(5, 2), (6, 1), (4, 3)])
def test_leapalign_is_algorithm_1_on_the_bare_transformer(small: Small, k: int, j: int) -> None:
    with operate(small.pipe, leapalign(k, j, 0.3)) as surgery:
        small()
    cotangents, actual = gradients(surgery.outputs, small)
    # Algorithm 1, lines 16-34, with the connector and the discount as the paper prints them
    sigmas, x = surgery.trajectory.sigmas, surgery.trajectory[STEPS]
    at = {t: sigmas[STEPS - t] for t in range(STEPS + 1)}
    predicted = torch.zeros_like(x)
    for t in range(STEPS, 0, -1):
        with torch.set_grad_enabled(t in (k, j)):
            if t == j:
                x_j = predicted + (x - predicted).detach()
                v = velocity(small, 0.3 * x_j + 0.7 * x_j.detach(), at[t])
                leap_0 = x_j - at[j].double() * v
            else:
                v = velocity(small, x, at[t])
                if t == k:
                    predicted = x - (at[k].double() - at[j].double()) * v
        x = (x.float() + (at[t - 1] - at[t]) * v.detach()).to(x.dtype)
    x_0 = leap_0 + (x - leap_0).detach()
    params = list(small.pipe.transformer.parameters())
    expected = torch.autograd.grad(x_0, params, cotangents[0])
    assert float((x - surgery.trajectory[0]).abs().max()) < 1e-5
    assert gap(actual, expected) < 1e-5


def test_images_carry_the_gradient_of_the_first_output(small: Small) -> None:
    with operate(small.pipe, leapalign(5, 2)) as surgery:
        images = small().images
    params = list(small.pipe.transformer.parameters())
    image_gradient = torch.autograd.grad(images.square().sum(), params)
    with operate(small.pipe, leapalign(5, 2)) as surgery:
        small()
    decoded = surgery.decode(surgery.outputs[0])
    assert torch.equal(decoded, images)
    assert gap(torch.autograd.grad(decoded.square().sum(), params), image_gradient) < 1e-10


def test_operate_makes_no_extra_model_call(small: Small) -> None:
    count = [0]
    small.pipe.transformer.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    small()
    plain, count[0] = count[0], 0
    with operate(small.pipe, leapalign(5, 2)):
        small()
    assert count[0] == plain
    count[0] = 0
    with operate(small.pipe, leapalign(5, 2), memory="recompute") as surgery:
        small()
    assert count[0] == plain
    gradients(surgery.outputs, small)
    assert count[0] == plain + 2 * plain // STEPS


def test_the_field_gives_the_recorded_velocities(small: Small) -> None:
    with operate(small.pipe) as surgery:
        images = small().images
    trajectory, state = surgery.trajectory, torch.get_rng_state()
    before = dict(small.pipe.scheduler.__dict__), dict(small.pipe.__dict__)
    for t in range(1, STEPS + 1):
        assert torch.equal(surgery.field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t))
    assert torch.equal(surgery.decode(trajectory[0]), images)
    assert torch.equal(torch.get_rng_state(), state)
    assert (small.pipe.scheduler.__dict__, small.pipe.__dict__) == before


def test_a_replay_does_not_fork_generators_of_other_devices(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns when the generators of many devices are forked, and warnings are errors in the tests."""
    with operate(small.pipe) as surgery:
        small()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    state = torch.get_rng_state()
    surgery.field(surgery.trajectory[3], surgery.trajectory.sigma(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_of_plans_on_one_rollout_add_up(small: Small) -> None:
    with operate(small.pipe) as surgery:
        small()
    cotangent = torch.ones_like(surgery.trajectory[0])
    total = None
    for plan in (leapalign(5, 2), leapalign(6, 3), refl(2)):
        with operate(small.pipe, plan) as single:
            small()
        grads = torch.autograd.grad(single.outputs[0], list(small.pipe.transformer.parameters()), cotangent)
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    for plan in (leapalign(5, 2), leapalign(6, 3), refl(2)):
        backward(plan, surgery.trajectory, surgery.field, cotangent)
    assert gap([p.grad for p in small.pipe.transformer.parameters()], total) < 1e-10


def test_noise_gets_its_gradient(small: Small) -> None:
    plan = Plan(noise().leap(0).connect())
    with operate(small.pipe, plan) as surgery:
        plain = small().images
    surgery.outputs[0].sum().backward()
    start = surgery.trajectory.start
    assert start is not None
    assert start.grad is not None
    assert bool(start.grad.any())
    assert torch.equal(plain, small().images)


def test_under_split_the_call_on_noise_and_what_follows_are_made_again_and_cost_says_so(small: Small) -> None:
    plan, calls = Plan(noise().leap(3).connect().leap(0)), list[bool]()
    handle = small.pipe.transformer.register_forward_hook(lambda *_: calls.append(True))
    with operate(small.pipe, plan, "split") as surgery:
        small()
    forward = len(calls)
    surgery.outputs[0].sum().backward()
    handle.remove()
    assert plan.cost(surgery.trajectory).staged == (STEPS, 3)
    assert (len(calls) - forward) * STEPS == 2 * forward  # two calls of the loop, each with its guidance passes


@pytest.mark.parametrize("memory", ["retain", "recompute", "split"])
def test_gains_of_flowbp_are_those_of_the_scheduler_s_own_times(small: Small, memory: Any) -> None:
    """Flux's times are shifted by the number of its image tokens, which no plan knows before the call."""
    params = list(small.pipe.transformer.parameters())
    grads: list[list[torch.Tensor]] = []
    for rescale in (0.0, 1.0):
        with operate(small.pipe, flowbp_sparse(STEPS, {6, 5}, rescale), memory) as surgery:
            small()
        for p in params:
            p.grad = None
        surgery.outputs[0].sum().backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params])
    lengths = (small.pipe.scheduler.sigmas[:-1] - small.pipe.scheduler.sigmas[1:]).double()
    gain = float(lengths.sum() / lengths[:2].sum())
    assert abs(gain - 3) > 0.1, "even steps would give 3"
    for plain, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(scaled, gain * plain, rtol=1e-4, atol=1e-6)
