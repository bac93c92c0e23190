"""Executions and closed forms small enough for paper: a field v = w x, whose every number can be written down.

With v_t = w x_t the rollout is x_{t-1} = x_t (1 + w (s_{t-1} - s_t)). These tests take a second; they are what
`benchmarks/mutants.py` runs first.
"""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from trajsurgery import (
    Plan,
    Polynomial,
    RectifiedFlow,
    SamplerError,
    Trajectory,
    Trigonometric,
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
from trajsurgery.execute import Execution, first_call, recompute_leaves, retained
from trajsurgery.interpolant import finite_leap, weights
from trajsurgery.node import Velocity

SIGMAS = [1.0, 0.75, 0.5, 0.0]
W = 0.5
X3 = torch.tensor([[2.0, -4.0]], dtype=torch.float64)


class Counted:
    """v = w x, with a count of the calls."""

    def __init__(self, w: float = W) -> None:
        self.w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        self.times: list[float] = []
        self.graphs: list[bool] = []

    def parameters(self) -> list[Tensor]:
        return [self.w]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.times.append(float(sigma))
        v = self.w * x
        self.graphs.append(v.requires_grad)
        return v


def rolled(field: Any = None, **options: Any) -> Trajectory:
    return rollout(field or Counted(), X3, SIGMAS, **options)


X2, X1, X0 = 2 * 0.875, 2 * 0.875**2, 2 * 0.875**2 * 0.75
"""The first component of the rollout."""


def first(x: Any) -> float:
    return float(x.detach()[0, 0])


def test_the_rollout() -> None:
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
    found: Any = apply(plan, rolled(), field, kind)
    return float(torch.autograd.grad(found, field.w, cotangent)[0])


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
            found: Any = apply(plan, rolled(), field, kind)  # type: ignore
            assert len(field.times) == count, (str(plan), memory)
            found.sum().backward()
        field = Counted()
        values(plan, rolled(), field)
        assert len(field.times) == recompute
        assert not any(field.graphs)


def test_a_pass_makes_no_call_of_its_own() -> None:
    field = Counted()
    found, _ = sample(leapalign(3, 1), field, X3, SIGMAS)
    assert field.times == [1.0, 0.75, 0.5]
    assert field.graphs == [True, False, True]
    assert first(found) == X0
    field = Counted()
    sample(leapalign(3, 1), field, X3, SIGMAS, memory="recompute")
    assert field.graphs == [False, False, False]
    field = Counted()
    sample(Plan(latent(3).leap(1).leap(0)), field, X3, SIGMAS)
    assert field.times == [1.0, 0.75, 0.5, 0.5]
    assert field.graphs == [True, False, False, True]


def test_misses() -> None:
    found = distances(leapalign(3, 1), rolled(), Counted())
    assert list(found) == [1, 0]
    assert float(found[1]) == pytest.approx((1 + 2) / 2 * abs(X1 - 2 * 0.75), rel=1e-13)
    assert float(found[0]) == 0
    twice = Plan(latent(3).leap(1).leap(0), latent(2).leap(1).leap(0))
    found = distances(twice, rolled(), Counted())
    assert float(found[1]) == pytest.approx(1.5 * abs(X1 - 2 * 0.75), rel=1e-13)  # the sampler's own is left out
    assert distances(leapalign(3, 1), rolled(Counted()), Counted())[1].dtype == torch.float64


def test_misses_of_narrow_latents_are_taken_in_float32() -> None:
    field = Counted()
    trajectory = rollout(lambda x, s: (field.w * x).bfloat16(), X3.bfloat16(), [1.0, 0.6, 0.3, 0.0])
    found = distances(leapalign(3, 1), trajectory, lambda x, s: (field.w * x).bfloat16())
    assert found[1].dtype == torch.float32
    mine = (trajectory[1].float() - (trajectory[3] + (0.3 - 1.0) * trajectory.velocity(3)).float()).abs().mean()
    assert float(found[1]) == pytest.approx(float(mine), rel=1e-2)


def executed(plan: Plan, t: int) -> Execution:
    """A plan's run when the rollout has come to x_t, the model not yet called there."""
    whole = rolled()
    trajectory = Trajectory(
        whole.sigmas,
        {s: x for s, x in whole.latents.items() if s >= t},
        {s: v for s, v in whole.velocities.items() if s > t},
    )
    execution = Execution(plan, trajectory)
    execution.settle()
    return execution


def test_what_a_growing_rollout_settles_and_wants() -> None:
    plan = leapalign(3, 1)
    execution = executed(plan, 3)
    start = execution.wanted(3)
    assert start is not None
    assert start.x is latent(3)
    assert execution.wanted(2) is None
    assert execution.wanted(1) is None
    execution = executed(plan, 2)
    assert execution.wanted(2) is None
    assert execution.wanted(3) is start
    assert set(execution.tensors) == {latent(3)}
    v = execution.trajectory[3] * 0.5
    execution.adopt(start, v)
    assert execution.wanted(3) is None
    assert execution.tensors[start] is v
    execution.trajectory.latents[1] = torch.full((1, 2), 7.0, dtype=torch.float64)
    execution.settle()
    later = execution.wanted(1)
    assert later is not None
    assert first(execution.tensors[later.x]) == 7
    execution.forget(1)
    assert execution.wanted(1) is None
    assert latent(3) in execution.tensors
    execution.trajectory.latents[1] = torch.full((1, 2), 9.0, dtype=torch.float64)
    execution.settle()
    assert execution.wanted(1) is later
    assert first(execution.tensors[later.x]) == 9


def test_what_is_forgotten_is_no_longer_faithful() -> None:
    plan = Plan(latent(3).leap(2).leap(0))
    execution = executed(plan, 3)
    call: Any = execution.wanted(3)
    execution.trajectory.velocities[3] = execution.trajectory[3] * W
    execution.adopt(call, execution.trajectory.velocities[3])
    execution.trajectory.latents[2] = rolled()[2]
    execution.settle()
    assert {node.op for node in execution.faithful} == {"latent", "velocity", "leap"}
    execution.forget(2)
    assert {node.op for node in execution.faithful} == {"latent", "velocity"}


def test_a_call_that_trains_nothing_is_read_off_the_rollout() -> None:
    """A stopped velocity at x_2: recorded at once, and no model call is left for the end."""
    plan = Plan(latent(2).leap(1, velocity=latent(2).velocity().detach()).leap(0))
    execution = executed(plan, 1)
    assert latent(2).velocity() in execution.tensors
    assert execution.wanted(2) is None
    field = Counted()
    execution.trajectory.velocities[1] = rolled().velocity(1)
    execution.trajectory.latents[0] = rolled()[0]
    (found,) = execution.finish(field, retained)
    assert field.times == [0.5]
    assert first(found) == X0


def test_renoised_samples_wait_for_the_image() -> None:
    plan = Plan(latent(2).leap(0), latent(0).renoise(2, "rollout").leap(0))
    assert {node.op for node in executed(plan, 1).tensors} == {"latent"}
    done = {node.op for node in executed(plan, 0).tensors}
    assert done == {"latent", "renoise"}


def test_the_call_that_a_pipeline_makes_first() -> None:
    for plan, wanted in (
        (leapalign(3, 1), latent(3).velocity()),
        (leapalign(2, 1), None),
        (Plan(latent(3).detach().leap(0)), latent(3).detach().velocity()),
        (Plan(noise().leap(0)), None),
        (Plan(latent(3).leap(0, velocity=latent(3).velocity("other"))), None),
        (Plan(latent(3).leap(1, velocity=latent(3).velocity().detach()).leap(0)), None),
        (Plan(latent(0).renoise(3).leap(0)), None),
    ):
        assert first_call(plan.prepared(3), 3) is wanted, str(plan)


def test_what_recompute_trains() -> None:
    one, other, third = Counted(), Counted(), Counted()
    plan = Plan(latent(3).leap(1).leap(0, velocity=latent(1).velocity("other")), latent(2).leap(0))
    fields: Any = {None: one, "other": other, "third": third}

    def found(plan: Plan, params: Any = None) -> dict[Any, list[int]]:
        leaves = recompute_leaves(Execution(plan, rolled()), fields, params)
        return {name: [id(leaf) for leaf in part] for name, part in leaves.items()}

    assert found(plan) == {None: [id(one.w)], "other": [id(other.w)]}
    assert found(plan, (third.w,)) == {None: [id(third.w)], "other": [id(third.w)]}
    stopped = Plan(latent(3).leap(1, velocity=latent(3).velocity("other").detach()).leap(0))
    assert found(stopped) == {None: [id(one.w)]}


def test_sharded_leaves_are_told() -> None:
    class Sharded(Counted):
        def parameters(self) -> list[Tensor]:
            leaf: Any = torch.nn.Parameter(self.w.detach())
            leaf.device_mesh = "mesh"
            return [self.w, leaf]

    with pytest.raises(SamplerError, match="DTensor"):
        apply(refl(2), rolled(), Sharded(), "recompute")


def test_which_outputs_are_idle() -> None:
    frozen: Any = {None: Counted(), "frozen": lambda x, s: 0.5 * x}
    plan = Plan(latent(2).leap(0), latent(2).leap(0, velocity=latent(2).velocity("frozen")))
    with pytest.raises(SamplerError, match=r"outputs \[1\] of the plan carry no gradient"):
        apply(plan, rolled(), frozen)


def test_nothing_is_trained_where_noise_is() -> None:
    """A frozen field, x_T trained: x_0 = x_3 (1 - w)."""
    start = X3.clone().requires_grad_()
    plan = Plan(noise().leap(0))
    trajectory = rollout(lambda x, s: 0.5 * x, start, SIGMAS)
    for memory in ("retain", "recompute"):
        kind: Any = memory
        found: Any = apply(plan, trajectory, lambda x, s: 0.5 * x, kind)
        assert torch.autograd.grad(found.sum(), start)[0].tolist() == [[0.5, 0.5]]
    backward(plan, trajectory, lambda x, s: 0.5 * x, torch.ones(1, 2))
    assert start.grad is not None
    assert start.grad.tolist() == [[0.5, 0.5]]


S = dict(zip("kjts", sympy.symbols("k j t s"), strict=True))


def test_coefficients_of_interpolants() -> None:
    half, pi = sympy.Rational(1, 2), sympy.pi
    for path, t, alpha, beta, alpha_rate, beta_rate in (
        (RectifiedFlow(), half, half, half, -1, 1),
        (Trigonometric(), half, sympy.sqrt(2) / 2, sympy.sqrt(2) / 2, -pi * sympy.sqrt(2) / 4, pi * sympy.sqrt(2) / 4),
        (Polynomial(), sympy.Rational(1, 3), sympy.Rational(8, 9), sympy.Rational(1, 3), -sympy.Rational(2, 3), 1),
    ):
        found = [f(t, sympy) for f in (path.alpha, path.beta, path.alpha_rate, path.beta_rate)]
        assert [sympy.simplify(a - b) for a, b in zip(found, (alpha, beta, alpha_rate, beta_rate), strict=True)] == [
            0
        ] * 4
    for path, leap in (
        (RectifiedFlow(), (1, -0.5)),
        (Trigonometric(), (2**-0.5, -(2**0.5) / torch.pi)),
        (Polynomial(), ((1 - 0.0625 + 0.375) / (1 + 0.5625), ((1 - 0.5625) * 0.25 - 0.75 * (1 - 0.0625)) / 1.5625)),
    ):
        assert path.leap(0.75, 0.25) == pytest.approx(leap, rel=1e-13)
        assert finite_leap(path, 0.75, 0.25) == pytest.approx(leap, rel=1e-13)


def test_weights_of_advances() -> None:
    assert weights("euler", [1.0, 0.75, 0.5], 1.0, 0.0) == [-0.25, -0.25, -0.5]
    assert weights("lagrange", [0.75], 0.75, 0.25) == [-0.5]
    # through (1, 1/2): v(s) = (2 s - 1) v_1 + (2 - 2 s) v_2, integrated from 1 to 0
    assert weights("lagrange", [1.0, 0.5], 1.0, 0.0) == pytest.approx([0, -1], abs=1e-14)
    assert weights("adams-bashforth", [0.5, 1.0], 0.5, 0.0) == pytest.approx([-0.75, 0.25], rel=1e-13)
    # Simpson's
    assert weights("lagrange", [1.0, 0.5, 0.0], 1.0, 0.0) == pytest.approx([-1 / 6, -4 / 6, -1 / 6], rel=1e-13)
    # four supports: 3/8
    assert weights("lagrange", [1.0, 2 / 3, 1 / 3, 0.0], 1.0, 0.0) == pytest.approx([-0.125, -0.375, -0.375, -0.125])


def table(plan: Plan, **options: Any) -> list[tuple[Any, ...]]:
    return [(t.output, t.jacobians, t.source, t.coefficient) for t in plan.gradient(**options).terms]


def test_terms_in_their_order() -> None:
    k, j, a = sympy.symbols("k j a")
    s1, s2, s3 = sympy.symbols("sigma_1 sigma_2 sigma_3")
    found = table(leapalign("k", "j", "a"))
    assert [row[:3] for row in found] == [(0, (), "j"), (0, (), "k"), (0, ("j",), "k")]
    assert [sympy.expand(row[3] - c) for row, c in zip(found, (-j, j - k, a * j * (k - j)), strict=True)] == [0, 0, 0]
    numbers = table(leapalign(3, 1, 0.25), sigmas=SIGMAS)
    assert numbers == [(0, (), 1, -0.5), (0, (), 3, -0.5), (0, (1,), 3, 0.0625)]
    plan = Plan(latent(2).leap(1).recover("rollout"), latent(0).renoise(3).velocity().x.leap(1))
    assert [
        sympy.simplify(row[3] - c) for row, c in zip(table(plan), ((s1 - s2) / (1 - s1), s1 - s3), strict=True)
    ] == [0, 0]
    straight = table(Plan(noise().leap(1).connect().leap(0)))
    assert [row[:3] for row in straight] == [
        *((0, (), 1), (0, (), "T"), (0, (), "T")),
        *((0, (1,), "T"), (0, (1,), "T"), (0, ("T",), "T"), (0, (1, "T"), "T")),
    ]
    up = table(Plan(latent(3).leap(0).renoise(2).leap(0)), interpolant=Trigonometric(), sigmas=[1, 0.5, 0.25, 0])
    a2 = float(sympy.cos(sympy.pi * 0.5 / 2))
    assert float(up[1][3]) == pytest.approx(-2 / float(sympy.pi) * a2 * float(sympy.cos(sympy.pi / 4)), rel=1e-13)


def test_kinds_and_orders_of_terms() -> None:
    terms = Plan(latent(4).leap(3).leap(2).leap(1).leap(0)).gradient().terms
    assert [term.order for term in terms] == [0] * 4 + [1] * 6 + [2] * 4 + [3]
    assert [terms[i].kind for i in (0, 4, 10, 14)] == ["single-step", "nested once", "nested twice", "nested 3 times"]
    assert Plan(noise().leap(0)).gradient().terms[-1].kind in ("straight", "nested once")
    assert [t.kind for t in Plan(noise().leap(0)).gradient().terms] == ["single-step", "straight", "nested once"]


def test_terms_are_counted_listed_and_limited() -> None:
    plan = Plan(latent(4).leap(3).leap(2).leap(1).leap(0))
    whole = plan.gradient()
    assert whole.count == len(whole.terms) == 15
    some = plan.gradient(limit=3)
    assert (some.count, len(some.terms)) == (15, 3)
    assert plan.gradient(limit=0).terms == []
    assert len(plan.gradient(limit=15).terms) == 15
    two = Plan(latent(2).leap(0), latent(1).leap(0), latent(3).leap(1).leap(0))
    assert two.gradient().count == len(two.gradient().terms) == 5


def test_terms_that_meet_are_merged_and_may_cancel() -> None:
    """One call on two ways to the output: v_2 by an advance and by the leap before it."""
    s0, s1, s2 = sympy.Integer(0), *sympy.symbols("sigma_1 sigma_2")
    v = latent(2).velocity()
    meets = Plan(latent(2).leap(1, velocity=v).advance(0, [latent(1).velocity(), v])).gradient()
    assert meets.count == len(meets.terms) == 2
    twice = next(term for term in meets.terms if term.source == 2)
    wanted = (s1 - s2) + sympy.integrate(*_line(s2, s1, s1, s0))
    assert sympy.simplify(twice.coefficient - wanted) == 0
    cancels = Plan(
        latent(2).advance(1, [v], "euler").advance(0, [recorded(1), v.scale(1)], "lagrange"), latent(1).leap(0)
    ).gradient(sigmas=[1.0, 0.5, 0.25, 0.0])
    assert cancels.count == len(cancels.terms)


def _line(at: Any, other: Any, start: Any, to: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    s = S["s"]
    return (s - other) / (at - other), (s, start, to)


def test_numbers_for_symbols() -> None:
    plan = leapalign(3, 1, 0.25)
    put = plan.gradient().numbers(SIGMAS)
    assert [float(term.coefficient) for term in put.terms] == [-0.5, -0.5, 0.0625]
    assert put.count == 3
    assert Velocity in {type(call) for call in put.terms[0].calls}
    exact = plan.gradient(sigmas=[1, sympy.Rational(3, 4), sympy.Rational(1, 2), 0])
    assert [str(term.coefficient) for term in exact.terms] == ["-1/2", "-1/2", "1/16"]
