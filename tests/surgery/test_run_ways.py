"""All ways of running a plan give one value and one gradient."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.builders.problems import WAYS, cotangents, distance, grads, outputs, problem, seeded
from tests.tolerances import EXACT, GRADIENT
from trajsurgery import Plan, apply, backward, draft_lv, drtune, latent, leapalign, noise, recorded, refl, rollout
from trajsurgery.testing import INTERPOLANTS, MLP, check_gradient, methods, plans, trajectories

STEPS, DIM = 5, 4
FIELD, GUIDED = MLP(DIM, seed=11), MLP(DIM, seed=12)
P = problem(FIELD, STEPS)
FIELDS = {None: FIELD, "guided": GUIDED}
LEAVES = [*FIELD.parameters(), *GUIDED.parameters()]


def run(way, plan, p=P, fields=FIELDS, leaves=None):
    """Outputs and gradients, with freshly drawn noises."""
    p.trajectory.noises.clear()
    return WAYS[way](plan, p, [*LEAVES, p.noise] if leaves is None else leaves, fields)


def agree(plan, p=P, fields=FIELDS, leaves=None):
    """Outputs and gradients of every way of running are those of retain."""
    expected, gradient = run("retain", plan, p, fields, leaves)
    for way in WAYS:
        out, got = run(way, plan, p, fields, leaves)
        for x, y in zip(out, expected, strict=True):
            assert torch.equal(x, y), way
        assert distance(got, gradient) <= GRADIENT, way


@given(plans(STEPS, fields=("guided",)))
@example(Plan(latent(4).leap(2).connect().leap(0), latent(4).leap(1).leap(0)))  # outputs that share a call
@example(draft_lv(2))
def test_every_plan(plan):
    agree(plan)


@given(plans(STEPS), st.sampled_from(INTERPOLANTS))
def test_every_plan_on_other_interpolants(plan, interpolant):
    p = problem(FIELD, STEPS, interpolant=interpolant)
    agree(plan, p, FIELD, [*FIELD.parameters(), p.noise])


@given(st.data(), st.integers(1, 7))
def test_the_methods_on_any_number_of_steps(data, steps):
    agree(data.draw(methods(steps)).draw(steps, seeded(0)), problem(FIELD, steps))


START = torch.tensor([[0.3923, -0.2236, -0.3195, -1.2050]], dtype=torch.float64)
DOUBLED = Plan(latent(5).advance(1, [latent(5).velocity().scale(2.0)], "adams-bashforth").leap(0))


@given(plans(STEPS).filter(lambda plan: "noise" not in str(plan.to_dict())), trajectories(FIELD, STEPS, (DIM,)))
@example(DOUBLED, rollout(FIELD, START, [1, 0.8, 0.6, 0.4, 0.2, 0]))  # bends: too wide a stencil misses by 3e-8
@example(Plan(latent(1).leap(0).discount(6.1e-5)), rollout(FIELD, START, [1, 0.8, 0.6, 0.4, 0.2, 0]))  # cancels
def test_the_public_checker_agrees(plan, trajectory):
    check_gradient(plan, trajectory, FIELD, tolerance=GRADIENT)


def test_the_public_checker_can_fail():
    plan = leapalign(4, 2, 0.3)
    with pytest.raises(AssertionError, match="misses the closed form"):
        check_gradient(plan, P.trajectory, WrongGradient(DIM, seed=11))


class WrongGradient(MLP):
    """A field whose every third call has a wrong gradient."""

    calls = 0

    def forward(self, x, sigma):
        self.calls += 1
        v = super().forward(x, sigma)
        return v if self.calls % 3 else v.detach() + 0.5 * (v - v.detach())


@pytest.mark.parametrize("way", WAYS)
def test_several_plans_on_one_trajectory(way):
    """One rollout, several plans, each with its cotangents: gradients add up."""
    many = [leapalign(4, 2, 0.3), refl(3), drtune(5, 2, {4}), Plan(latent(5).leap(0).connect())]
    trajectory_before = {t: P.trajectory[t].clone() for t in range(STEPS + 1)}
    alone = [run(way, plan)[1] for plan in many]
    for leaf in LEAVES:
        leaf.grad = None
    for plan in many:
        out = outputs(apply(plan, P.trajectory, FIELDS))
        backward(plan, P.trajectory, FIELDS, cotangents(out))
    summed = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in LEAVES]
    expected = [sum(gs) for gs in zip(*(g[: len(LEAVES)] for g in alone), strict=True)]
    assert distance(summed, expected) <= EXACT * 10
    assert all(torch.equal(P.trajectory[t], x) for t, x in trajectory_before.items())


def test_staged_adds_into_grad_and_returns_nothing():
    plan, c = leapalign(4, 2, 0.3), cotangents([P.trajectory[0]])
    for p in P.params:
        p.grad = torch.full_like(p, 2.0)
    assert backward(plan, P.trajectory, FIELD, c[0]) is None
    expected = torch.autograd.grad(apply(plan, P.trajectory, FIELD), P.params, c[0])
    assert distance([p.grad - 2 for p in P.params], expected) <= 1e-12


def test_staged_gives_gradient_to_params_only():
    for p in P.params:
        p.grad = None
    first, *others = P.params
    backward(leapalign(4, 2, 0.3), P.trajectory, FIELD, torch.ones_like(P.trajectory[0]), params=iter([first]))
    assert first.grad.abs().max() > 0
    assert all(p.grad is None for p in others)


def test_staged_makes_one_backward_a_call():
    calls = []
    hooked = MLP(DIM, seed=11)
    hooked.outer.bias.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    apply(leapalign(4, 2, 0.3), P.trajectory, hooked).sum().backward()
    assert len(calls) == 1
    backward(leapalign(4, 2, 0.3), P.trajectory, hooked, torch.ones_like(P.trajectory[0]))
    assert len(calls) == 3


@pytest.mark.parametrize("way", WAYS)
def test_renoise_uses_one_noise_in_the_forward_and_the_backward_pass(way):
    """The backward pass calls the field on the same input as the forward pass."""
    inputs = []

    class Recording(MLP):
        def forward(self, x, sigma):
            if x.shape[0] == 3 and float(sigma) == float(P.sigmas[STEPS - 1]):
                inputs.append(x.detach().clone())
            return super().forward(x, sigma)

    field = Recording(DIM, seed=11)
    plan = Plan(*draft_lv(2).outputs[1:])
    run(way, plan, P, field, list(field.parameters()))
    noisy = [x for x in inputs if not torch.equal(x, P.trajectory[1])]
    assert len({tuple(x.flatten().tolist()) for x in noisy}) == 2


def test_noises_are_drawn_once_for_all_runs_on_a_trajectory():
    """The staged sweep and the closed form use the noises that the forward pass drew, whatever the generator."""
    p, plan = problem(FIELD, STEPS), draft_lv(2)
    out = apply(plan, p.trajectory, FIELD, generator=seeded(1))
    cs = cotangents(out)
    expected = torch.autograd.grad(out, p.params, cs)
    for leaf in p.params:
        leaf.grad = None
    backward(plan, p.trajectory, FIELD, cs, generator=seeded(2))
    assert distance([leaf.grad for leaf in p.params], expected) <= EXACT * 10
    assert distance(list(plan.gradient().evaluate(p.trajectory, FIELD, cs)), expected) <= EXACT * 10
    again = apply(plan, p.trajectory, FIELD, "recompute", generator=seeded(3))
    assert all(torch.equal(x, y) for x, y in zip(again, out, strict=True))
    assert distance(torch.autograd.grad(again, p.params, cs), expected) <= EXACT * 10
    assert len({tuple(eps.flatten().tolist()) for eps in p.trajectory.noises.values()}) == 2


def test_a_draw_has_one_noise_at_each_time():
    trajectory = problem(FIELD, STEPS).trajectory
    first, again, other = (trajectory.noise(0, t, seeded(t)) for t in (2, 2, 3))
    assert first is again
    assert not torch.equal(first, other)
    assert trajectory.noise("rollout", 2) is trajectory[STEPS]


def test_noise_gets_its_gradient():
    """ReNO: the gradient of x_T is that of plain autograd through the steps."""
    p = problem(FIELD, STEPS)
    x, reference = noise(), p.noise
    for t in range(STEPS, 0, -1):
        x = x.leap(t - 1)
        reference = reference + (p.sigmas[STEPS - t + 1] - p.sigmas[STEPS - t]) * FIELD(reference, p.sigmas[STEPS - t])
    c = cotangents([reference])
    expected = grads([reference], [p.noise, *p.params], c)
    for way in WAYS:
        _, got = WAYS[way](Plan(x), p, [p.noise, *p.params], FIELD)
        assert distance(got, expected) <= GRADIENT, way
        p.noise.grad = None


def test_recorded_and_detached_calls_cost_nothing():
    plan = Plan(latent(5).leap(4, velocity=recorded(5)).leap(0, discount=0))
    assert plan.cost(P.trajectory).extra == 0
    assert draft_lv(2).cost(P.trajectory).extra == 2
    assert draft_lv(2).cost(STEPS) == draft_lv(2).cost(P.trajectory)
    assert draft_lv(2).cost(P.trajectory).calls == 3
