"""Executions and closed forms against values worked out by hand, on the field v = w x.

With v_t = w x_t the rollout is x_{t-1} = x_t (1 + w (s_{t-1} - s_t)). These tests take a second;
`benchmarks/engine/mutants.py` runs them first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders.linear_field import SIGMAS, X0, X1, X2, X3, Counted, W, first, rolled
from trajsurgery import (
    Plan,
    SamplerError,
    apply,
    backward,
    distances,
    latent,
    leapalign,
    noise,
    recorded,
    refl,
    rollout,
    sample,
    values,
)
from trajsurgery.surgery.execution import Execution
from trajsurgery.surgery.parameters import leaves_by_field


def test_the_rollout_records_latents_and_velocities() -> None:
    field = Counted()
    trajectory = rolled(field)
    assert [first(trajectory[t]) for t in (3, 2, 1, 0)] == [2, X2, X1, X0]
    assert [first(trajectory.velocity(t)) for t in (3, 2, 1)] == [1, X2 / 2, X1 / 2]
    assert field.times == [1.0, 0.75, 0.5]
    assert not any(field.graphs)


def derivative(plan: Any, memory: str, field: Counted) -> float:
    """d(first component of the output)/dw."""
    cotangent = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    if memory == "staged":
        backward(plan, rolled(), field, cotangent)
        assert field.w.grad is not None
        return float(field.w.grad)
    kind: Any = memory
    out: Any = apply(plan, rolled(), field, kind)
    return float(torch.autograd.grad(out, field.w, cotangent)[0])


PLANS: dict[str, tuple[Plan, float, float]] = {
    # plan, value, derivative by w: x_k + (s_j - s_k) w x, with the edges of the plan
    "refl": (refl(2), X2 - 0.75 * W * X2, -0.75 * X2),
    "two leaps": (leapalign(3, 1, 0.25), X0, -0.5 * X1 - 0.5 * 2 + 0.25 * 0.5 * W * 0.5 * 2),
    "no discount": (leapalign(3, 1, 1), X0, -0.5 * X1 - 0.5 * 2 + 0.5 * W * 0.5 * 2),
    "full discount": (leapalign(3, 1, 0), X0, -0.5 * X1 - 0.5 * 2),
    "a scale": (Plan(latent(2).leap(0, velocity=latent(2).velocity().scale(3))), X2 - 0.75 * W * X2, -0.75 * X2 * 3),
    "a prediction": (
        Plan(latent(3).leap(1).leap(0)),
        2 * 0.75 * 0.75,
        -0.5 * 2 * (1 - 0.5 * W) - 0.5 * (2 * 0.75),
    ),
    "the sampler's own steps": (
        Plan(latent(2).leap(1).leap(0)),
        X0,
        -0.25 * X2 * (1 - 0.5 * W) - 0.5 * X1,
    ),
    "a stop": (Plan(latent(2).leap(1).detach().leap(0)), X0, -0.5 * X1),
    "a recorded velocity": (
        Plan(latent(2).leap(1).leap(0, velocity=recorded(1))),
        X1 - 0.5 * W * X1,
        -0.25 * X2,
    ),
    "an advance": (
        Plan(latent(2).advance(0, [latent(2).velocity(), latent(1).velocity()], "euler")),
        X2 - 0.25 * W * X2 - 0.5 * W * X1,
        -0.25 * X2 - 0.5 * X1,
    ),
    "renoised": (
        Plan(latent(0).renoise(2, "rollout").leap(0)),
        (0.25 * X0 + 0.75 * 2) * (1 - 0.75 * W),
        -0.75 * (0.25 * X0 + 0.75 * 2),
    ),
    "recovered": (
        Plan(latent(2).leap(1).recover("rollout")),
        (X1 - 0.5 * 2) / 0.5,
        -0.25 * X2 / 0.5,
    ),
}


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged"])
@pytest.mark.parametrize("name", PLANS)
def test_values_and_derivatives(name: str, memory: str) -> None:
    plan, value, slope = PLANS[name]
    assert first(values(plan, rolled(), Counted())) == pytest.approx(value, rel=1e-13)
    assert derivative(plan, memory, Counted()) == pytest.approx(slope, rel=1e-13)
    assert float(plan.gradient().evaluate(rolled(), Counted(), torch.tensor([[1.0, 0.0]]))[0]) == pytest.approx(slope)


def test_how_often_the_model_is_called() -> None:
    for plan, retain, recompute in (
        (leapalign(3, 1), 2, 0),  # both inputs are recorded
        (Plan(latent(3).leap(1).leap(0)), 2, 1),  # the second is not
        (Plan(latent(2).leap(1, velocity=recorded(2)).leap(0)), 1, 0),
    ):
        for memory, count in (("retain", retain), ("recompute", recompute)):
            field, kind = Counted(), memory
            out: Any = apply(plan, rolled(), field, kind)  # type: ignore[arg-type]
            assert len(field.times) == count, (str(plan), memory)
            out.sum().backward()
        field = Counted()
        values(plan, rolled(), field)
        assert len(field.times) == recompute
        assert not any(field.graphs)


def test_sample_makes_no_extra_call() -> None:
    field = Counted()
    x_0, _ = sample(leapalign(3, 1), field, X3, SIGMAS)
    assert field.times == [1.0, 0.75, 0.5]
    assert field.graphs == [True, False, True]
    assert first(x_0) == X0
    field = Counted()
    sample(leapalign(3, 1), field, X3, SIGMAS, memory="recompute")
    assert field.graphs == [False, False, False]
    field = Counted()
    sample(Plan(latent(3).leap(1).leap(0)), field, X3, SIGMAS)
    assert field.times == [1.0, 0.75, 0.5, 0.5]
    assert field.graphs == [True, False, False, True]


def test_distances() -> None:
    by_time = distances(leapalign(3, 1), rolled(), Counted())
    assert list(by_time) == [1, 0]
    assert float(by_time[1]) == pytest.approx((1 + 2) / 2 * abs(X1 - 2 * 0.75), rel=1e-13)
    assert float(by_time[0]) == 0
    twice = Plan(latent(3).leap(1).leap(0), latent(2).leap(1).leap(0))
    by_time = distances(twice, rolled(), Counted())
    assert float(by_time[1]) == pytest.approx(
        1.5 * abs(X1 - 2 * 0.75), rel=1e-13
    )  # the leap that is the sampler's step is left out
    assert distances(leapalign(3, 1), rolled(Counted()), Counted())[1].dtype == torch.float64


def test_distances_of_bfloat16_latents_are_float32() -> None:
    field = Counted()
    trajectory = rollout(lambda x, s: (field.w * x).bfloat16(), X3.bfloat16(), [1.0, 0.6, 0.3, 0.0])
    by_time = distances(leapalign(3, 1), trajectory, lambda x, s: (field.w * x).bfloat16())
    assert by_time[1].dtype == torch.float32
    expected = (trajectory[1].float() - (trajectory[3] + (0.3 - 1.0) * trajectory.velocity(3)).float()).abs().mean()
    assert float(by_time[1]) == pytest.approx(float(expected), rel=1e-2)


def test_recompute_trains_the_fields_that_the_plan_calls() -> None:
    one, other, third = Counted(), Counted(), Counted()
    plan = Plan(latent(3).leap(1).leap(0, velocity=latent(1).velocity("other")), latent(2).leap(0))
    fields: Any = {None: one, "other": other, "third": third}

    def leaf_ids(plan: Plan, params: Any = None) -> dict[Any, list[int]]:
        leaves = leaves_by_field(fields, Execution(plan, rolled()).sources, rolled(), params)
        return {name: [id(leaf) for leaf in part] for name, part in leaves.items()}

    assert leaf_ids(plan) == {None: [id(one.w)], "other": [id(other.w)]}
    assert leaf_ids(plan, (third.w,)) == {None: [id(third.w)], "other": [id(third.w)]}
    stopped = Plan(latent(3).leap(1, velocity=latent(3).velocity("other").detach()).leap(0))
    assert leaf_ids(stopped) == {None: [id(one.w)]}


def test_sharded_leaves_are_refused() -> None:
    class Sharded(Counted):
        def parameters(self) -> list[Tensor]:
            leaf: Any = torch.nn.Parameter(self.w.detach())
            leaf.device_mesh = "mesh"
            return [self.w, leaf]

    with pytest.raises(SamplerError, match="DTensor"):
        apply(refl(2), rolled(), Sharded(), "recompute")


def test_outputs_without_gradient_are_named() -> None:
    frozen: Any = {None: Counted(), "frozen": lambda x, s: 0.5 * x}
    plan = Plan(latent(2).leap(0), latent(2).leap(0, velocity=latent(2).velocity("frozen")))
    with pytest.raises(SamplerError, match=r"outputs \[1\] of the plan carry no gradient"):
        apply(plan, rolled(), frozen)


def test_noise_trains_under_a_frozen_field() -> None:
    """A frozen field, x_T trained: x_0 = x_3 (1 - w)."""
    start = X3.clone().requires_grad_()
    plan = Plan(noise().leap(0))
    trajectory = rollout(lambda x, s: 0.5 * x, start, SIGMAS)
    for memory in ("retain", "recompute"):
        kind: Any = memory
        x_0: Any = apply(plan, trajectory, lambda x, s: 0.5 * x, kind)
        assert torch.autograd.grad(x_0.sum(), start)[0].tolist() == [[0.5, 0.5]]
    backward(plan, trajectory, lambda x, s: 0.5 * x, torch.ones(1, 2))
    assert start.grad is not None
    assert start.grad.tolist() == [[0.5, 0.5]]
