"""split: each call has its own graph; gradients go into `.grad` call by call, and no call is made twice."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from torch import Tensor

from tests.builders.problems import Problem, cotangents, distance, grads, outputs, problem, seeded
from trajsurgery import Plan, PlanError, SamplerError, apply, latent, leapalign, noise, sample
from trajsurgery.plans.nodes import Noise
from trajsurgery.testing import MLP
from trajsurgery.testing.strategies import plans

PLAN = leapalign(6, 3, 0.3)


class Counting(torch.nn.Module):
    """A field that counts its calls."""

    def __init__(self, field: MLP) -> None:
        super().__init__()
        self.field, self.calls = field, 0

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.field(x, sigma)


def test_in_one_pass_no_call_is_made_twice(rolled: Problem) -> None:
    field = Counting(rolled.field)
    x_0, trajectory = sample(PLAN, field, rolled.noise, rolled.sigmas, memory="split")
    assert torch.equal(x_0, trajectory[0])
    x_0.sum().backward()
    assert field.calls == trajectory.steps


def test_on_a_recorded_trajectory_each_call_is_made_once_in_the_backward_pass(rolled: Problem) -> None:
    field = Counting(rolled.field)
    x_0 = apply(PLAN, rolled.trajectory, field, "split")
    assert field.calls == 0
    x_0.sum().backward()
    assert field.calls == 2


def test_gradients_add_up_in_grad_and_params_limits_them(rolled: Problem) -> None:
    expected = grads((apply(PLAN, rolled.trajectory, rolled.field),), rolled.params, (torch.ones(3, 4),))
    for leaf in rolled.params:
        leaf.grad = torch.ones_like(leaf)
    first = rolled.params[0]
    apply(PLAN, rolled.trajectory, rolled.field, "split", params=[first]).sum().backward()
    assert distance([first.grad - 1], expected[:1]) <= 1e-12
    assert all(torch.equal(leaf.grad, torch.ones_like(leaf)) for leaf in rolled.params[1:])


def test_noise_gets_its_gradient(rolled: Problem) -> None:
    plan = Plan(noise().leap(3).leap(0))
    (expected,) = torch.autograd.grad(apply(plan, rolled.trajectory, rolled.field).sum(), rolled.noise)
    apply(plan, rolled.trajectory, rolled.field, "split").sum().backward()
    assert rolled.noise.grad is not None
    assert distance([rolled.noise.grad], [expected]) <= 1e-12


def test_a_call_s_graph_is_freed_after_its_backward_pass(rolled: Problem) -> None:
    """What the second call saved is freed before the first call's backward pass begins."""
    alive: list[int] = []
    saved: weakref.WeakSet[Tensor] = weakref.WeakSet()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            ctx.held = v.detach().clone()
            saved.add(ctx.held)
            return v.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            alive.append(len(saved))
            return grad

    field = rolled.field
    x_0, _ = sample(PLAN, lambda x, s: Watched.apply(field(x, s)), rolled.noise, rolled.sigmas, memory="split")
    x_0.sum().backward()
    assert alive == [2, 1]


MISUSES = {
    "autograd.grad": lambda loss, noise: torch.autograd.grad(loss, noise),
    "inputs": lambda loss, noise: loss.backward(inputs=[noise]),
    "create_graph": lambda loss, noise: loss.backward(create_graph=True),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_what_needs_the_whole_graph_is_refused(rolled: Problem, misuse: Any) -> None:
    x_0 = apply(Plan(noise().leap(3).leap(0)), rolled.trajectory, rolled.field, "split")
    with pytest.raises(RuntimeError, match=r"memory='split' adds parameter gradients into \.grad.*memory='retain'"):
        misuse(x_0.sum(), rolled.noise)
    assert all(leaf.grad is None for leaf in (*rolled.params, rolled.noise))


def test_weights_changed_before_the_backward_pass_are_refused(rolled: Problem) -> None:
    x_0 = apply(PLAN, rolled.trajectory, rolled.field, "split")
    with torch.no_grad():
        rolled.params[0].add_(1)
    with pytest.raises(RuntimeError, match="changed in place between the forward and the backward pass"):
        x_0.sum().backward()


def test_weights_frozen_before_the_backward_pass_are_refused(rolled: Problem) -> None:
    x_0 = apply(PLAN, rolled.trajectory, rolled.field, "split")
    rolled.field.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen since the forward pass"):
        x_0.sum().backward()


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_a_frozen_field_is_refused(rolled: Problem, in_one_pass: bool) -> None:
    rolled.field.requires_grad_(False)
    run = partial(sample, PLAN, rolled.field, rolled.noise, rolled.sigmas, memory="split")
    with pytest.raises(SamplerError, match="no parameter of the field requires a gradient"):
        run() if in_one_pass else apply(PLAN, rolled.trajectory, rolled.field, "split")


def test_a_second_backward_pass_is_torch_s_own_error(rolled: Problem) -> None:
    x_0, _ = sample(PLAN, rolled.field, rolled.noise, rolled.sigmas, memory="split")
    x_0.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        x_0.sum().backward()


def test_an_unknown_memory_names_the_three(rolled: Problem) -> None:
    with pytest.raises(PlanError, match='"retain", "recompute" or "split"'):
        apply(Plan(latent(1).leap(0)), rolled.trajectory, rolled.field, "some")  # type: ignore[arg-type]


@given(plan=plans(4))
@example(Plan(latent(4).leap(2).connect().leap(0), latent(2).leap(0)))  # two calls at t = 2
@example(Plan(latent(4).leap(2).connect().leap(0), latent(2).leap(1).connect().leap(0)))
@example(Plan(latent(2).leap(0), latent(4).leap(2).connect().leap(1).connect().leap(0)))  # late at 2, so late at 1
@example(Plan(latent(0).renoise(3).connect().leap(0)))
def test_cost_names_the_calls_that_split_makes_again_in_the_backward_pass(plan: Plan) -> None:
    assume(not any(isinstance(node, Noise) for node in plan.nodes))  # `operate` draws x_T itself: see test_operate.py
    p = problem(MLP(4, 8, 0), 4)
    field = Counting(p.field)
    x, trajectory = sample(plan, field, p.noise, p.sigmas, memory="split", generator=seeded())
    cost, forward = plan.cost(trajectory), field.calls
    assert forward == trajectory.steps + cost.extra
    values = outputs(x)
    torch.autograd.backward(values, cotangents(values))
    assert field.calls - forward == len(cost.staged)
    assert ("again in the backward pass" in str(cost)) == bool(cost.staged)
    assert plan.cost(4).staged == cost.staged
