"""Values: the trajectory is the sampler's bit for bit, exact plans give its image, other plans their prediction."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given

from tests.builders.problems import SIGMAS, cotangents, outputs, problem, seeded
from tests.tolerances import VALUE
from trajsurgery import (
    Plan,
    Polynomial,
    Trajectory,
    Trigonometric,
    apply,
    distances,
    draft_lv,
    drtune,
    latent,
    leapalign,
    leaps,
    refl,
    rollout,
    sample,
    values,
)  # fmt: skip
from trajsurgery.testing import MLP, plans

DTYPES = tuple(VALUE)
EXACT_PLANS = (leapalign(6, 3, 0.3), leapalign(8, 1, 0.1), leaps((8, 5, 2), 0.5), leapalign(2, 1, 0.0))


def run(dtype):
    """A nonlinear field, noise and sigmas of a dtype; float32 sigmas for the half dtypes, as schedulers have them."""
    field = MLP(4, seed=3, dtype=dtype)
    noise = torch.randn(3, 4, generator=seeded(), dtype=torch.float64).to(dtype)
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return field, noise, torch.tensor(SIGMAS, dtype=wide)


def euler(field, x, sigmas):
    """The plain sampler."""
    latents = [x]
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            x = x + (after - now) * field(x, now)
            latents.append(x)
    return latents[::-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rollout_is_the_plain_sampler_bit_for_bit(dtype):
    field, noise, sigmas = run(dtype)
    trajectory = rollout(field, noise, sigmas)
    for t, x in enumerate(euler(field, noise, sigmas)):
        assert torch.equal(trajectory[t], x)
        assert trajectory[t].dtype == dtype
        assert not trajectory[t].requires_grad
    assert all(not trajectory.velocity(t).requires_grad for t in range(1, 9))


@pytest.mark.parametrize("memory", ["retain", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [*EXACT_PLANS, drtune(8, 2, {7, 3}), draft_lv(1), refl(4)])
def test_surgery_inside_the_rollout_changes_no_bit_of_it(plan, dtype, memory):
    field, noise, sigmas = run(dtype)
    out, trajectory = sample(plan, field, noise, sigmas, memory=memory, generator=seeded())
    for t, x in enumerate(euler(field, noise, sigmas)):
        assert torch.equal(trajectory[t], x)
    assert outputs(out)[0].requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", EXACT_PLANS)
def test_exact_plans_give_the_rollout_s_image(plan, dtype):
    field, noise, sigmas = run(dtype)
    trajectory = rollout(field, noise, sigmas)
    assert plan.exact
    for memory in ("retain", "recompute"):
        assert torch.equal(apply(plan, trajectory, field, memory), trajectory[0])
        assert torch.equal(sample(plan, field, noise, sigmas, memory=memory)[0], trajectory[0])
    assert torch.equal(values(plan, trajectory, field), trajectory[0])


def test_on_this_field_the_textbook_connector_rounds():
    """Shows that the test above can fail: these leaps miss by the size of the latents."""
    for dtype in DTYPES:
        field, noise, sigmas = run(dtype)
        trajectory = rollout(field, noise, sigmas)
        prediction = apply(Plan(latent(8).leap(0)), trajectory, field).detach()
        assert (prediction - trajectory[0]).abs().mean() > 0.5 * trajectory[0].abs().mean()
        assert not torch.equal(prediction + (trajectory[0] - prediction), trajectory[0])


@given(plans(8))
def test_recorded_latents_are_returned_bit_for_bit(plan):
    p = problem(MLP(4, seed=3))
    out = outputs(apply(plan, p.trajectory, p.field))
    for node, value in zip(plan.outputs, out, strict=True):
        while node.op in ("discount", "detach"):
            node = node.x
        if node.op in ("connect", "latent", "noise"):
            t = 8 if node.t == "T" else node.t
            assert torch.equal(value, p.trajectory[t])


def test_steps_of_the_sampler_are_recorded_not_computed(rolled):
    """leap(t - 1) from a faithful x on a rectified-flow Euler trajectory."""
    plan = drtune(8, 1, {8, 3})
    assert torch.equal(values(plan, rolled.trajectory, rolled.field), rolled.trajectory[0])
    assert plan.cost(rolled.trajectory).extra == 0


@pytest.mark.parametrize("euler", [True, None])
def test_steps_of_a_scheduler_that_computes_in_float32_are_recorded_too(euler):
    """diffusers computes steps of bfloat16 latents in float32: computed in bfloat16, they have other bits."""
    field, _, sigmas = run(torch.bfloat16)
    x = torch.randn(64, 4, generator=seeded()).to(torch.bfloat16)
    latents, velocities = {8: x}, {}
    for t in range(8, 0, -1):
        velocities[t] = field(x, sigmas[8 - t]).detach()
        x = (x.float() + (sigmas[9 - t] - sigmas[8 - t]) * velocities[t].float()).to(torch.bfloat16)
        latents[t - 1] = x
    trajectory = Trajectory(sigmas, latents, velocities, euler=euler)
    again = latents[8] + (sigmas[1] - sigmas[0]) * velocities[8]
    assert not torch.equal(again, latents[7])
    assert torch.equal(values(Plan(latent(8).leap(7)), trajectory, field), latents[7])
    assert torch.equal(apply(drtune(8, 1, {5}), trajectory, field), latents[0])
    assert drtune(8, 1, {5}).cost(trajectory).extra == 0


def test_steps_of_another_sampler_are_predictions(rolled):
    """A sampler whose steps are measured and are not Euler's."""
    latents = {t: x if t % 2 else x + 0.1 for t, x in rolled.trajectory.latents.items()}
    other = Trajectory(rolled.sigmas, latents, rolled.trajectory.velocities, euler=None)
    x_2 = values(Plan(latent(3).leap(2)), other, rolled.field)
    torch.testing.assert_close(x_2, rolled.trajectory[2])
    assert not torch.equal(x_2, other[2])


@pytest.mark.parametrize("interpolant", [Trigonometric(), Polynomial()])
def test_on_other_interpolants_a_step_is_a_prediction(interpolant):
    p = problem(MLP(4, seed=3), interpolant=interpolant)
    x_2 = values(Plan(latent(3).leap(2)), p.trajectory, p.field)
    a, b = interpolant.leap(p.trajectory.sigma(3), p.trajectory.sigma(2), torch)
    torch.testing.assert_close(x_2, a * p.trajectory[3] + b * p.trajectory.velocity(3))
    assert not torch.equal(x_2, p.trajectory[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_predictions_are_correct_in_every_dtype(dtype):
    field, noise, sigmas = run(dtype)
    trajectory = rollout(field, noise, sigmas)
    x_0 = apply(refl(5), trajectory, field)
    expected = trajectory[5].double() - float(trajectory.sigma(5)) * trajectory.velocity(5).double()
    assert x_0.dtype == dtype
    torch.testing.assert_close(x_0.double(), expected, rtol=VALUE[dtype], atol=VALUE[dtype])


def test_values_have_no_gradient_and_shape_of_the_plan(rolled):
    one = values(leapalign(6, 3), rolled.trajectory, rolled.field)
    several = values(draft_lv(2), rolled.trajectory, rolled.field, generator=seeded())
    assert isinstance(one, torch.Tensor)
    assert isinstance(several, tuple)
    assert len(several) == 3
    assert not any(x.requires_grad for x in (one, *several))
    for x, y in zip(several, apply(draft_lv(2), rolled.trajectory, rolled.field), strict=True):
        assert torch.equal(x, y)


def test_distances_are_those_of_the_predictions_to_the_rollout(rolled):
    by_time = distances(leapalign(6, 3, 0.3), rolled.trajectory, rolled.field)
    assert list(by_time) == [3, 0]
    x = rolled.trajectory
    landed = x[6] + (x.sigma(3) - x.sigma(6)) * x.velocity(6)
    torch.testing.assert_close(by_time[3], (x[3] - landed).abs().mean(1))
    assert by_time[3].shape == (3,)
    assert not by_time[3].requires_grad


def test_steps_of_the_sampler_have_distance_zero(rolled):
    by_time = distances(drtune(8, 2, {7}), rolled.trajectory, rolled.field)
    assert all(d.eq(0).all() for t, d in by_time.items() if t != 0)
    assert by_time[0].min() > 0


def test_samples_do_not_mix(rolled):
    """The gradient of one sample's output reaches that sample only."""
    c = torch.zeros_like(rolled.trajectory[0])
    c[1] = cotangents([c[1]])[0]
    out = apply(leapalign(6, 3, 0.3), rolled.trajectory, rolled.field)
    together = torch.autograd.grad(out, rolled.params, c)
    alone = rollout(rolled.field, rolled.noise[1:2], rolled.sigmas)
    single = torch.autograd.grad(apply(leapalign(6, 3, 0.3), alone, rolled.field), rolled.params, c[1:2])
    for x, y in zip(together, single, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "plan, extra", [(leapalign(6, 3, 0.3), 0), (drtune(8, 2, {7, 3}), 0), (refl(4), 0), (draft_lv(2), 2)]
)
def test_calls_of_the_rollout_are_reused(plan, extra, mlp):
    """Algorithm 1: no extra model call, but for the renoised samples."""
    calls = []
    p = problem(mlp)

    def field(x, sigma):
        calls.append(float(sigma))
        return mlp(x, sigma)

    sample(plan, field, p.noise, p.sigmas)
    assert len(calls) == 8 + extra
    calls.clear()
    apply(plan, p.trajectory, field)
    assert len(calls) == plan.cost(p.trajectory).calls
    calls.clear()
    values(plan, p.trajectory, field)
    assert len(calls) == extra


@pytest.mark.parametrize("draw", [0, 7, "rollout"])
def test_recover_undoes_renoise(draw, rolled):
    plan = Plan(latent(6).leap(0).renoise(5, draw).recover(draw))
    plain = Plan(latent(6).leap(0))
    torch.testing.assert_close(
        values(plan, rolled.trajectory, rolled.field), values(plain, rolled.trajectory, rolled.field)
    )


def test_renoise_mixes_image_and_noise(rolled):
    x_4 = values(Plan(latent(6).leap(0).connect().renoise(4, "rollout")), rolled.trajectory, rolled.field)
    x = rolled.trajectory
    torch.testing.assert_close(x_4, (1 - x.sigma(4)) * x[0] + x.sigma(4) * x[8])


def test_a_trajectory_may_hold_some_latents_only() -> None:
    """Latents that the plan does not read may be missing: x_T was read for its dtype and batch size."""
    w = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def field(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return w * x

    whole = rollout(field, torch.ones(2, 3, dtype=torch.float64), [1.0, 0.7, 0.4, 0.0])
    part = Trajectory(whole.sigmas, {t: whole[t] for t in (2, 1, 0)}, {t: whole.velocity(t) for t in (2, 1)})
    for plan in (leapalign(2, 1), Plan(latent(2).leap(0).connect())):
        assert torch.equal(apply(plan, part, field), apply(plan, whole, field))
        for t, missed in distances(plan, whole, field).items():
            assert torch.equal(distances(plan, part, field)[t], missed)
