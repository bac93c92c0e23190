"""Invalid cotangents, trajectories, params and plans, and arguments in the wrong order: each is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trajsurgery import (
    Plan,
    PlanError,
    SamplerError,
    Trajectory,
    apply,
    backward,
    distances,
    draft_lv,
    latent,
    leapalign,
    noise,
    rollout,
    sample,
    values,
)
from trajsurgery.testing import MLP

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMAS = [1.0, 0.7, 0.4, 0.0]
TIMES = torch.tensor(SIGMAS, dtype=torch.float64)
FIELD: Any = MLP(4)
PLAN: Any = leapalign(3, 1)
RENOISING: Any = draft_lv(1)
ONES = torch.ones_like(X)


def rolled() -> Trajectory:
    return rollout(FIELD, X.clone(), SIGMAS)


COTANGENTS: dict[str, tuple[Any, str]] = {
    "nothing": (None, r"\['NoneType'\] for outputs of shapes \[\(2, 4\)\]"),
    "a number": (1.0, r"\['float'\]"),
    "a dict": ({0: ONES}, r"\['dict'\]"),
    "a list with nothing": ([None], r"\['NoneType'\]"),
    "another shape": (ONES[:1], r"\[\(1, 4\)\]"),
    "two": ([ONES, ONES], "one for each output"),
    "none": ([], "one for each output"),
    "integers": (ONES.long(), r"torch\.int64.*floating dtype"),
    "complex": (ONES + 0j, r"torch\.complex128"),
    "elsewhere": (ONES.to("meta"), "on meta.*on cpu"),
    "NaN": (ONES * math.nan, r"\[0\] hold NaN or Inf"),
    "Inf": ([ONES / 0], r"\[0\] hold NaN or Inf"),
}


@pytest.mark.parametrize("mistake", COTANGENTS)
def test_an_invalid_cotangent_is_refused(mistake: str) -> None:
    bad, message = COTANGENTS[mistake]
    for run in (
        lambda: backward(PLAN, rolled(), FIELD, bad),
        lambda: PLAN.gradient().evaluate(rolled(), FIELD, bad),
    ):
        with pytest.raises(SamplerError, match=f"cotangent.*{message}"):
            run()


def test_the_message_names_the_cotangent_that_is_not_finite() -> None:
    with pytest.raises(SamplerError, match=r"cotangents \[1\] hold"):
        backward(RENOISING, rolled(), FIELD, [ONES, ONES * math.nan])
    field = MLP(4)
    backward(RENOISING, rolled(), field, [ONES, ONES * math.nan], check=False)
    assert all(p.grad is not None and bool(p.grad.isnan().any()) for p in field.parameters())


def test_a_cotangent_of_another_precision_is_cast() -> None:
    one, other = MLP(4), MLP(4)
    backward(PLAN, rolled(), one, ONES.float())
    backward(PLAN, rolled(), other, ONES)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [FIELD, None, X, (X, None), object()], ids=lambda a: type(a).__name__)
def test_arguments_in_another_order_are_refused(other: Any) -> None:
    for run in (apply, values, distances, lambda *a: backward(*a, ONES)):
        with pytest.raises(SamplerError, match=rf"received a {type(other).__name__} for.*\(plan, trajectory, field\)"):
            run(PLAN, other, FIELD)
    with pytest.raises(PlanError, match=f"received a {type(other).__name__} for the trajectory"):
        PLAN.gradient().evaluate(other, FIELD, ONES)
    with pytest.raises(PlanError, match="number of steps"):
        PLAN.cost(other)
    for swapped in (lambda: apply(other, PLAN, FIELD), lambda: sample(other, PLAN, X, SIGMAS)):
        with pytest.raises(PlanError, match="is no plan"):
            swapped()


@pytest.mark.parametrize("generator", [3, "a", np.random.default_rng(0)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("plan", [PLAN, RENOISING], ids=["without", "with"])
def test_what_is_no_generator_is_refused(plan: Any, generator: Any) -> None:
    for run in (apply, values, distances, lambda *a, **k: backward(*a, [ONES] * len(plan.outputs), **k)):
        with pytest.raises(SamplerError, match="generator= received"):
            run(plan, rolled(), FIELD, generator=generator)


@pytest.mark.parametrize("params", [FIELD, FIELD.outer.bias, 3, [None], [FIELD.outer.bias, 3], "abc"])
def test_invalid_params_are_refused(params: Any) -> None:
    for run in (
        lambda: apply(PLAN, rolled(), FIELD, params=params),
        lambda: apply(PLAN, rolled(), FIELD, "recompute", params=params),
        lambda: backward(PLAN, rolled(), FIELD, ONES, params=params),
        lambda: PLAN.gradient().evaluate(rolled(), FIELD, ONES, params),
        lambda: sample(PLAN, FIELD, X, SIGMAS, params=params),
    ):
        with pytest.raises(SamplerError, match="params= received"):
            run()


@pytest.mark.parametrize("interpolant", ["rectified", 3, type(rolled().interpolant)], ids=str)
def test_what_is_no_interpolant_is_refused(interpolant: Any) -> None:
    for run in (lambda: rollout(FIELD, X, SIGMAS, interpolant), lambda: sample(PLAN, FIELD, X, SIGMAS, interpolant)):
        with pytest.raises(SamplerError, match=r"interpolant received.*RectifiedFlow\(\)"):
            run()


HANDMADE: dict[str, tuple[Callable[[Trajectory], Any], str]] = {
    "sigmas in a list": (lambda t: Trajectory(SIGMAS, t.latents, t.velocities), "sigmas received list"),  # type: ignore[arg-type]
    "latents in a list": (lambda t: Trajectory(TIMES, [X] * 4, t.velocities), "latents are a dict"),  # type: ignore[arg-type]
    "velocities in a list": (lambda t: Trajectory(TIMES, t.latents, [X] * 3), "velocities are a dict"),  # type: ignore[arg-type]
    "a latent past T": (lambda t: Trajectory(TIMES, {**t.latents, 4: X}, {}), r"t = 0\.\.3; received.*at t = 4"),
    "a velocity at 0": (lambda t: Trajectory(TIMES, {}, {0: X}), r"t = 1\.\.3; received.*at t = 0"),
    "a time of its own": (lambda t: Trajectory(TIMES, {"T": X}, {}), "at t = 'T'"),  # type: ignore[arg-type]
    "a number": (lambda t: Trajectory(TIMES, {3: 1.0}, {}), "received float at t = 3"),  # type: ignore[arg-type]
    "integers": (lambda t: Trajectory(TIMES, {3: X.long()}, {}), r"received torch\.int64 at t = 3"),
    "two shapes": (
        lambda t: Trajectory(TIMES, {**t.latents, 1: X[:1]}, {}),
        r"one shape; received \[\(1, 4\), \(2, 4\)",
    ),
    "no latents": (lambda t: apply(PLAN, Trajectory(TIMES, {}, {}), FIELD), "holds no x_3"),
    "no velocities": (lambda t: backward(PLAN, Trajectory(TIMES, t.latents, {}), FIELD, ONES), "holds no v_3"),
    "some latents": (lambda t: apply(PLAN, Trajectory(TIMES, {3: X}, {3: X, 1: X}), FIELD), r"no x_1, only.*\[3\]"),
}


@pytest.mark.parametrize("mistake", HANDMADE)
def test_an_invalid_trajectory_is_refused(mistake: str) -> None:
    make, message = HANDMADE[mistake]
    with pytest.raises(SamplerError, match=message):
        make(rolled())


@pytest.mark.parametrize("t", ["T", 2.5, 1.0, None, slice(1, 2), -1, 4])
def test_times_outside_a_trajectory_are_refused(t: Any) -> None:
    for read in (lambda: rolled()[t], lambda: rolled().velocity(t), lambda: rolled().sigma(t)):
        with pytest.raises(PlanError, match=r"outside [01]\.\.3"):
            read()
    with pytest.raises(PlanError, match="outside"):
        rolled().replace(t, X)


PLANS: dict[str, tuple[Callable[[], Any], str]] = {
    "True for alpha": (lambda: leapalign(3, 1, True), "True"),
    "True bound": (lambda: leapalign("k", "j", "a").at(a=True), "True"),
    "NaN for alpha": (lambda: leapalign(3, 1, math.nan), "nan"),
    "NaN bound": (lambda: leapalign("k", "j", "a").at(a=math.nan), "nan"),
    "times as floats": (lambda: leapalign(3.0, 1.0), r"the time 3\.0"),  # type: ignore[arg-type]
    "a float bound": (lambda: leapalign("k", "j").at(k=3.5), r"the time 3\.5"),
    "nothing bound": (lambda: leapalign("k", "j").at(k=None), r"plan\.at received a NoneType"),
    "a list bound": (lambda: leapalign("k", "j").at(k=[1]), r"plan\.at received a list"),
    "a tensor bound": (lambda: leapalign("k", "j").at(k=torch.ones(2)), r"plan\.at received a Tensor"),
    "a time in a list": (lambda: latent([2]), r"received \{'time': \[2\]\}"),  # type: ignore[arg-type]
    "a factor in a list": (lambda: latent(2).discount([1]), r"received \{'a': \[1\]\}"),  # type: ignore[arg-type]
    "a draw in a list": (lambda: latent(0).renoise(2, [1]), "received"),  # type: ignore[arg-type]
    "a tensor for a velocity": (lambda: latent(2).leap(0, velocity=X), "received a Tensor"),  # type: ignore[arg-type]
    "tensors for velocities": (lambda: latent(2).advance(0, [X]), "received a Tensor"),  # type: ignore[arg-type]
    "one velocity for several": (lambda: latent(2).advance(0, latent(2).velocity()), "give a list"),  # type: ignore[arg-type]
    "nothing for several": (lambda: latent(2).advance(0, None), "give a list"),  # type: ignore[arg-type]
    "no steps": (lambda: PLAN.prepared("3"), "number of steps"),
    "steps as a float": (lambda: PLAN.prepared(3.0), "number of steps"),
    "another T": (lambda: apply(leapalign(5, 1), rolled(), FIELD), r"the time 5, of 3 steps"),
    "unbound names": (lambda: apply(leapalign("k", "j"), rolled(), FIELD), r"k, j.*plan\.at"),
}


@pytest.mark.parametrize("mistake", PLANS)
def test_an_invalid_plan_is_refused(mistake: str) -> None:
    make, message = PLANS[mistake]
    with pytest.raises(PlanError, match=message):
        make()


def test_noise_without_requires_grad_is_refused() -> None:
    plan = Plan(noise().leap(0))
    for run in (lambda: apply(plan, rolled(), FIELD), lambda: backward(plan, rolled(), FIELD, ONES)):
        with pytest.raises(SamplerError, match="requires_grad_"):
            run()
