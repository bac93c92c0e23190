"""Errors of a run and their messages."""

import math

import pytest
import torch

from tests.builders.problems import problem
from trajsurgery import (
    Plan,
    PlanError,
    SamplerError,
    SurgeryError,
    Trajectory,
    apply,
    backward,
    distances,
    draft_lv,
    latent,
    leapalign,
    noise,
    refl,
    rollout,
    sample,
    values,
)  # fmt: skip
from trajsurgery.testing import MLP

X = torch.zeros(2, 4, dtype=torch.float64)
FIELD = MLP(4)
PLAN = leapalign(2, 1)


@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([1.0], r"shape \(1,\)"),
        ([], r"shape \(0,\)"),
        ([[1.0, 0.0]], "shape"),
        ([1.0, 0.5, 0.5, 0.0], "strictly monotone"),
        ([1.0, 0.2, 0.5], "strictly monotone"),
        ([1.0, math.nan, 0.0], "NaN"),
        ([math.inf, 0.5, 0.0], "NaN or Inf"),
        ([14.6, 3.0, 0.0], "variance-preserving or EDM"),
        ([1.0, 0.5, -0.1], r"\[0, 1\]"),
    ],
)
def test_invalid_sigmas_are_refused(sigmas, message):
    for times in (sigmas, torch.tensor(sigmas, dtype=torch.float64)):
        with pytest.raises(SamplerError, match=message):
            rollout(FIELD, X, times)
        with pytest.raises(SamplerError, match=message):
            sample(PLAN, FIELD, X, times)


def test_rising_sigmas_are_allowed():
    """Schedulers that count up are monotone all the same."""
    assert rollout(FIELD, X, [0.0, 0.4, 1.0]).steps == 2


@pytest.mark.parametrize("bad", [lambda x, s: x[:, :2], lambda x, s: x[:1], lambda x, s: x.sum()])
def test_a_velocity_of_another_shape_is_refused(bad):
    with pytest.raises(SamplerError, match=r"shape .* latent of shape \(2, 4\)"):
        rollout(bad, X, [1.0, 0.5, 0.0])
    trajectory = rollout(FIELD, X, [1.0, 0.5, 0.0])
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(SamplerError, match=r"shape .* latent of shape \(2, 4\), at t = "):
        apply(PLAN, trajectory, lambda x, s: bad(w * x, s))


@pytest.mark.parametrize("plan", [PLAN, draft_lv(1)])
def test_cotangents_of_another_shape_or_number_are_refused(plan):
    trajectory = rollout(FIELD, X, [1.0, 0.5, 0.0])
    for bad in (X[:1], [X, X, X], []):
        with pytest.raises(SamplerError, match="one for each output"):
            backward(plan, trajectory, FIELD, bad)


def test_an_unknown_field_is_named():
    trajectory = rollout(FIELD, X, [1.0, 0.5, 0.0])
    plan = Plan(latent(2).leap(0, velocity=latent(2).velocity("guided")))
    for fields in (FIELD, {None: FIELD, "other": FIELD}):
        with pytest.raises(SamplerError, match=r"'guided'.*'guided': other_field"):
            apply(plan, trajectory, fields)


@pytest.mark.parametrize("run", [apply, values, distances, lambda *a: backward(*a, X)])
@pytest.mark.parametrize(
    "plan, rule",
    [
        (leapalign("k", "j"), "unbound"),
        (leapalign(5, 1), "time-range"),
        (Plan(latent(2).leap(0), steps=7), "steps"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(run, plan, rule):
    with pytest.raises(PlanError) as err:
        run(plan, rollout(FIELD, X, [1.0, 0.5, 0.0]), FIELD)
    assert err.value.rules == (rule,)


def test_a_plan_that_does_not_fit_is_refused_before_the_rollout():
    def never(x, sigma):
        raise AssertionError("the model was called")

    with pytest.raises(PlanError):
        sample(leapalign(5, 1), never, X, [1.0, 0.5, 0.0])


def test_an_unknown_memory_is_refused():
    with pytest.raises(PlanError, match=r"memory='staged'.*trajsurgery\.backward"):
        apply(PLAN, rollout(FIELD, X, [1.0, 0.5, 0.0]), FIELD, "staged")


def test_noise_without_a_leaf_is_refused():
    with pytest.raises(SamplerError, match="requires_grad_"):
        apply(Plan(noise().leap(0)), rollout(FIELD, X, [1.0, 0.5, 0.0]), FIELD)


def test_values_need_no_leaf():
    trajectory = rollout(FIELD, X, [1.0, 0.5, 0.0])
    assert torch.equal(
        values(Plan(noise().leap(0)), trajectory, FIELD), values(Plan(latent(2).leap(0)), trajectory, FIELD)
    )


def test_recover_where_alpha_is_zero_is_refused():
    plan = Plan(
        latent(0).renoise(2).velocity().x.leap(1).recover(), latent(2).recover(draw="rollout").renoise(1).leap(0)
    )
    with pytest.raises(SamplerError, match="alpha_t is 0"):
        apply(plan, rollout(FIELD, X, [1.0, 0.5, 0.0]), FIELD)


def test_times_outside_a_trajectory_are_refused():
    trajectory = problem(FIELD, 4).trajectory
    assert trajectory.steps == 4
    assert float(trajectory.sigma(4)) == 1
    assert float(trajectory.sigma(0)) == 0
    for bad in (
        lambda: trajectory[5],
        lambda: trajectory[-1],
        lambda: trajectory.velocity(0),
        lambda: trajectory.sigma(5),
        lambda: trajectory.sigma(-1),
    ):
        with pytest.raises(PlanError, match=r"outside \d\.\.4"):
            bad()


def test_a_trajectory_checks_its_sigmas():
    with pytest.raises(SamplerError):
        Trajectory(torch.tensor([0.5, 0.5]), {}, {})


def test_a_run_that_trains_nothing_is_refused():
    frozen = MLP(4).requires_grad_(False)
    trajectory = rollout(frozen, X, [1.0, 0.5, 0.0])
    rolled = rollout(frozen, X.clone().requires_grad_(), [1.0, 0.5, 0.0])
    for run in (
        lambda: apply(refl(1), trajectory, frozen),
        lambda: sample(refl(1), frozen, X, [1.0, 0.5, 0.0]),
        lambda: apply(refl(1), trajectory, lambda x, s: FIELD(x, s).detach()),
        lambda: apply(Plan(refl(1).outputs[0], noise().leap(0)), rolled, frozen),
        lambda: apply(refl(1), trajectory, frozen, "recompute"),
        lambda: apply(refl(1), trajectory, lambda x, s: frozen(x, s), "recompute"),
        lambda: backward(refl(1), trajectory, frozen, X),
        lambda: apply(refl(1), trajectory, FIELD, "recompute", params=[]),
        lambda: refl(1).gradient().evaluate(trajectory, frozen, X),
    ):
        with pytest.raises(SamplerError, match="requires_grad_"):
            run()


def test_inference_mode_is_refused():
    trajectory = rollout(FIELD, X, [1.0, 0.5, 0.0])
    with torch.inference_mode(), pytest.raises(SamplerError, match="inference_mode"):
        apply(PLAN, trajectory, FIELD)


def test_all_errors_are_surgery_errors():
    assert issubclass(PlanError, SurgeryError)
    assert issubclass(PlanError, ValueError)
    assert issubclass(SamplerError, RuntimeError)
