"""Published direct-gradient methods: their gradients equal their closed forms in every way of running."""

import pytest
import sympy
import torch

from tests.builders.problems import WAYS, cotangents, distance, grads, problem
from tests.tolerances import EXACT, GRADIENT
from trajsurgery import (
    apply,
    backward,
    draft_k,
    flowbp_bridge,
    flowbp_lagrange,
    flowbp_sparse,
    reno,
    rollout,
    srpo,
    values,
)
from trajsurgery.testing import MLP, check_gradient

STEPS = 6
FIELD, GUIDED = MLP(4, seed=3), MLP(4, seed=4)
P = problem(FIELD, STEPS)


METHODS = {
    "whole trajectory": draft_k(STEPS),
    "DRaFT-3": draft_k(3),
    "FlowBP-Sparse": flowbp_sparse(STEPS, {5, 2}),
    "FlowBP-Bridge": flowbp_bridge(STEPS, 3, {5, 1}, 0.3),
    "FlowBP-Lagrange": flowbp_lagrange(6, 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_the_closed_form_s(name):
    closed = check_gradient(METHODS[name], P.trajectory, FIELD, tolerance=GRADIENT).gradients[0]
    assert all(g.abs().max() > 0 for g in closed[: len(P.params)])


@pytest.mark.parametrize("name", METHODS)
def test_the_value_is_the_rollout_s(name):
    """All of these are the sampler's steps, or connected: their output is x_0, bit for bit."""
    assert torch.equal(values(METHODS[name], P.trajectory, FIELD), P.trajectory[0])


def test_the_whole_trajectory_is_plain_backpropagation():
    x = P.noise.detach()
    for now, after in zip(P.sigmas[:-1], P.sigmas[1:], strict=True):
        x = x + (after - now) * FIELD(x, now)
    expected = torch.autograd.grad(x, P.params, cotangents([x]))
    for way in WAYS:
        _, actual = WAYS[way](METHODS["whole trajectory"], P, P.params, FIELD)
        assert distance(actual, expected) <= EXACT * 10, way


def test_srpo_trains_the_guided_field():
    plan = srpo(4, 2, "guided", draw=0)
    (term,) = plan.gradient().terms
    s4, s2 = sympy.symbols("sigma_4 sigma_2")
    assert sympy.simplify(term.coefficient - (s2 - s4) / (1 - s2)) == 0
    leaves = [*FIELD.parameters(), *GUIDED.parameters()]
    _, actual = WAYS["recompute"](plan, P, leaves, {None: FIELD, "guided": GUIDED})
    eps = P.trajectory.noises[0, 4]
    x, sigma = P.trajectory, P.trajectory.sigma
    noisy = (1 - sigma(4)) * x[0] + sigma(4) * eps
    stepped = noisy + (sigma(2) - sigma(4)) * GUIDED(noisy, sigma(4))
    recovered = (stepped - sigma(2) * eps) / (1 - sigma(2))
    assert distance(actual, grads([recovered], leaves, cotangents([recovered]))) <= EXACT


def test_reno_trains_the_noise():
    (through, straight) = (p for p in reno().gradient().terms if p.calls[-1].op == "noise")
    assert {through.order, straight.order} == {0, 1}


@pytest.mark.parametrize("plan", [reno(), reno(3)])
def test_reno_trains_the_noise_of_a_frozen_field(plan):
    """Only x_T trains: recompute and the closed form required parameters."""
    frozen = MLP(4, seed=3).requires_grad_(False)
    start = P.noise.detach().clone().requires_grad_()
    trajectory = rollout(frozen, start, P.sigmas)
    (c,) = cotangents([trajectory[0]])
    expansion = plan.gradient().evaluate(trajectory, frozen, c)
    assert expansion.norms[0] > 0 or expansion.norms[-1] > 0
    for memory in ("retain", "recompute"):
        (gradient,) = torch.autograd.grad(apply(plan, trajectory, frozen, memory), start, c)
        assert distance([gradient], [expansion.start]) <= EXACT, memory
    backward(plan, trajectory, frozen, c)
    assert distance([start.grad], [expansion.start]) <= EXACT
