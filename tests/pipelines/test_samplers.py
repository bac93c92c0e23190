"""Every flow-matching sampler of diffusers: the scheduler's sigmas, exact connectors, and which steps are Euler's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from tests.builders.pipelines.checks import by_hand, flat, gap, gradient, transformers
from tests.builders.pipelines.images import sd3
from tests.builders.pipelines.parts import STEPS, Small
from tests.tolerances import STOCK
from trajsurgery import PlanError, backward, draft_lv, drtune, leapalign, leaps, operate, refl

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EULER: dict[str, Callable[[], Any]] = {
    "static": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "exponential shift": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "linear shift": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    "terminal": lambda: FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
    "Karras": lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "exponential sigmas": lambda: FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True),
    "beta sigmas": lambda: FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
    "inverted": lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "LCM": lambda: FlowMatchLCMScheduler(shift=3.0),
    "UniPC": lambda: UniPCMultistepScheduler(flow_shift=3.0, **_FLOW),
    "UniPC, third order": lambda: UniPCMultistepScheduler(solver_order=3, **_FLOW),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(flow_shift=3.0, **_FLOW),
    "DPM-Solver++, stochastic": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **_FLOW),
}
PLANS = {
    "leapalign": leapalign(STEPS, 2, 0.3),
    "three leaps": leaps((STEPS, 3, 1), 0.5),
    "drtune": drtune(STEPS, 1, {STEPS, 2}),
    "refl": refl(2),
    "draft_lv": draft_lv(1),
}


@pytest.fixture(scope="module")
def small() -> Small:
    """SD3, whose scheduler the tests replace."""
    return sd3()


def with_sampler(small: Small, name: str) -> Any:
    small.pipe.scheduler = (EULER | OTHERS)[name]()
    dynamic = small.pipe.scheduler.config.get("use_dynamic_shifting", False)
    small.arguments["mu"] = 0.8 if dynamic else None
    return small.pipe.scheduler


@pytest.mark.parametrize("name", EULER | OTHERS)
def test_plans_are_exact_and_all_ways_agree(small: Small, name: str) -> None:
    scheduler = with_sampler(small, name)
    params = transformers(small)
    plain = small()[0]
    for plan in PLANS.values():
        grads: dict[str, torch.Tensor] = {}
        for memory in ("retain", "recompute"):
            with operate(small.pipe, plan, memory, generator=torch.Generator().manual_seed(0)) as surgery:
                images = small()[0]
            assert not plan.exact or torch.equal(images, plain)
            torch.manual_seed(1)
            cotangents = [torch.randn_like(output) for output in surgery.outputs]
            grads[memory] = flat(gradient(surgery.outputs, cotangents, params))
        backward(plan, surgery.trajectory, surgery.field, cotangents, params=params)
        staged = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        for p in params:
            p.grad = None
        assert bool(grads["retain"].any())
        assert gap(grads["recompute"], grads["retain"]) < STOCK
        assert gap(staged, grads["retain"]) < STOCK
        if plan is PLANS["leapalign"]:
            assert gap(grads["retain"], flat(by_hand(surgery, STEPS, 2, cotangents[0], params))) < STOCK
    trajectory, field = surgery.trajectory, surgery.field
    assert set(trajectory.sigmas.tolist()) <= set(scheduler.sigmas.tolist())
    with torch.no_grad():
        for t in range(1, STEPS + 1):
            assert torch.equal(field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t))


@pytest.mark.parametrize("name", EULER | OTHERS)
def test_a_leap_is_the_samplers_step_where_that_is_eulers(small: Small, name: str) -> None:
    with_sampler(small, name)
    with operate(small.pipe) as surgery:
        small()
    trajectory = surgery.trajectory
    for t in range(1, STEPS + 1):
        change = (trajectory.sigma(t - 1) - trajectory.sigma(t)).double() * trajectory.velocity(t)
        missed = float((trajectory[t] + change - trajectory[t - 1]).abs().max())
        assert trajectory.is_step(t) == (missed < 1e-5)
        assert trajectory.is_step(t) or name in OTHERS
    cost = drtune(STEPS, 1, {STEPS, 2}).cost(trajectory)  # every step of it is a leap(t - 1)
    assert cost.unfaithful == tuple(t for t in range(STEPS, 0, -1) if not trajectory.is_step(t))
    assert ("unfaithful" in str(cost)) == bool(cost.unfaithful) == (name in OTHERS)


def test_an_inverted_schedule_renoises_towards_the_noise(small: Small) -> None:
    """Sigma 0 is noise in it: the shares of noise and image are swapped."""
    with_sampler(small, "inverted")
    with operate(small.pipe) as surgery:
        small()
    trajectory = surgery.trajectory
    assert trajectory.sigma(STEPS) < trajectory.sigma(0) == 1
    for t, noisy in ((STEPS, 1.0), (0, 0.0)):
        assert float(trajectory.interpolant.beta(trajectory.sigma(t))) == pytest.approx(noisy)
    assert (float(trajectory.interpolant.alpha(trajectory.sigma(0)))) == 1


def test_a_step_of_heun_is_one_interval_of_two_calls(small: Small) -> None:
    """Two calls of the model an interval, one in the last; the velocities are those at the recorded latents."""
    with_sampler(small, "Heun")
    count = [0]
    handle = small.pipe.transformer.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with operate(small.pipe, leapalign(STEPS, 1)) as surgery:
        small()
    handle.remove()
    assert surgery.trajectory.steps == STEPS
    assert count[0] == 2 * STEPS - 1
    with pytest.raises(PlanError, match="6 steps"), operate(small.pipe, drtune(6, 2, {6})):
        small()
