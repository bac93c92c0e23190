"""Eq. 10, proved: for every plan, autograd's gradient is the closed form, evaluated by an independent witness."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.builders.closed_form_witness import Witness
from tests.builders.problems import cotangents, distance, grads, outputs, problem
from tests.tolerances import GRADIENT
from trajsurgery import Plan, apply, drtune, latent, leapalign, leaps, noise, rollout
from trajsurgery.testing import INTERPOLANTS, MLP, Gaussian, fields, methods, plans, sigmas, trajectories

STEPS = 5
DIM = 4
FIELD, GUIDED = MLP(DIM, seed=11), MLP(DIM, seed=12)
ROLLED = problem(FIELD, STEPS).trajectory
FROM_START = Plan(noise().advance(0, [latent(1).velocity(), noise().velocity(), latent(2).velocity()], rule="euler"))


def closed_and_autograd(plan, trajectory, field, guided=None):
    """The closed form's and autograd's gradient of all parameters and of x_T."""
    named = {None: field} if guided is None else {None: field, "guided": guided}
    out = outputs(apply(plan, trajectory, named))
    cs = cotangents(out)
    expansion = plan.gradient(trajectory.sigmas.tolist(), trajectory.interpolant)
    assert expansion.count == len(expansion.terms)
    coefficients = [float(term.coefficient) for term in expansion.terms]
    closed = Witness(plan, trajectory, named).gradient(expansion.terms, coefficients, cs)
    leaves = [*(p for f in named.values() for p in f.parameters()), trajectory.start]
    return closed, grads(out, leaves, cs)


@given(plans(STEPS), trajectories(FIELD, STEPS, (DIM,), INTERPOLANTS))
@example(leapalign(4, 2, 0.3), ROLLED)
@example(leaps((5, 4, 2, 1), 0.5), ROLLED)
@example(drtune(5, 2, {5, 3}), ROLLED)
def test_autograd_is_the_closed_form_on_an_mlp(plan, trajectory):
    closed, autograd = closed_and_autograd(plan, trajectory, FIELD)
    assert distance(autograd, closed) <= GRADIENT


@given(plans(STEPS), sigmas(STEPS), st.sampled_from(INTERPOLANTS), st.integers(0, 2**16))
def test_autograd_is_the_closed_form_on_gaussian_fields(plan, times, interpolant, seed):
    """Linear fields with their exact velocity, for every interpolant; mean and spread train."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread, *noise = torch.randn(4, DIM, generator=generator, dtype=torch.float64)
    field = Gaussian(mean, 0.3 + spread.abs(), interpolant)
    start = torch.stack(noise).requires_grad_()
    trajectory = rollout(field, start, torch.tensor(times, dtype=torch.float64), interpolant)
    closed, autograd = closed_and_autograd(plan, trajectory, field)
    assert distance(autograd, closed) <= GRADIENT


@given(plans(STEPS, fields=("guided",)), st.data())
def test_autograd_is_the_closed_form_on_random_fields(plan, data):
    field, guided = data.draw(fields(DIM)), data.draw(fields(DIM))
    trajectory = data.draw(trajectories(field, STEPS, (DIM,)))
    closed, autograd = closed_and_autograd(plan, trajectory, field, guided)
    assert distance(autograd, closed) <= GRADIENT


@given(st.integers(1, 8), st.data())
def test_autograd_is_the_closed_form_of_methods_on_any_number_of_steps(steps, data):
    field = data.draw(fields(DIM))
    trajectory = data.draw(trajectories(field, steps, (DIM,)))
    plan = data.draw(methods(steps)).draw(steps)
    closed, autograd = closed_and_autograd(plan, trajectory, field)
    assert distance(autograd, closed) <= GRADIENT


@given(plans(STEPS), trajectories(FIELD, STEPS, (DIM,), INTERPOLANTS))
@example(Plan(noise()), ROLLED)  # params were ignored where no call trains them
@example(FROM_START, ROLLED)  # supports were not sorted where one is at "T"
def test_the_library_s_evaluation_agrees(plan, trajectory):
    out = outputs(apply(plan, trajectory, FIELD))
    cs = cotangents(out)
    got = plan.gradient(interpolant=trajectory.interpolant).evaluate(trajectory, FIELD, cs, FIELD.parameters())
    expected = grads(out, [*FIELD.parameters(), trajectory.start], cs)
    start = expected[-1] * 0 if got.start is None else got.start
    assert distance([*got, start], expected) <= GRADIENT
    assert len(got.terms) == len(got.norms)


@given(plans(STEPS, fields=("guided",)), trajectories(FIELD, STEPS, (DIM,), INTERPOLANTS))
@example(Plan(latent(4).leap(2, velocity=latent(4).velocity("guided").detach()).leap(0)), ROLLED)
def test_values_are_what_the_primitives_define(plan, trajectory):
    """The witness computes unrecorded values by plain formulas."""
    named = {None: FIELD, "guided": GUIDED}
    out = outputs(apply(plan, trajectory, named))
    witness = Witness(plan, trajectory, named)
    for node, value in zip(plan.outputs, out, strict=True):
        torch.testing.assert_close(value.detach(), witness.values[node], rtol=1e-9, atol=1e-9)


def test_the_witness_detects_a_wrong_coefficient():
    plan = leapalign(4, 2, 0.3)
    expansion = plan.gradient(ROLLED.sigmas.tolist())
    out = outputs(apply(plan, ROLLED, FIELD))
    cs = cotangents(out)
    wrong = [(1.01 if term.order else 1.0) * float(term.coefficient) for term in expansion.terms]
    closed = Witness(plan, ROLLED, {None: FIELD}).gradient(expansion.terms, wrong, cs)
    assert distance(grads(out, [*FIELD.parameters(), ROLLED.start], cs), closed) > 1e-5


def test_terms_of_coefficient_zero_keep_their_place():
    """Terms whose coefficient is 0 on these sigmas were dropped, which shifted the others against their norms."""
    plan = Plan(latent(3).leap(0).renoise(6).leap(0))  # at T nothing is left of the image
    rolled = problem(MLP(4), 6)
    expansion = plan.gradient()
    gradient = expansion.evaluate(rolled.trajectory, rolled.field, torch.ones_like(rolled.noise))
    assert len(gradient.terms) == len(expansion.terms) == 3
    assert [norm > 0 for norm in gradient.norms] == [term.source == 6 for term in expansion.terms]
