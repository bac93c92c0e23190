"""Forward mode: <J t, c> = <t, J^T c> for every plan, and torch.func's transforms agree with autograd."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.func import functional_call, jacfwd, jacrev, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.builders.problems import cotangents, distance, grads, outputs, problem
from tests.builders.small_transformers import float64_throughout, flux, sd3
from tests.tolerances import GRADIENT, STOCK
from trajsurgery import Plan, apply, latent, leapalign, sample
from trajsurgery.testing import INTERPOLANTS, MLP, plans, trajectories

STEPS, DIM = 5, 4
FIELD = MLP(DIM, seed=11)
ROLLED = problem(FIELD, STEPS).trajectory
DETACHED = Plan(latent(4).leap(2).detach().leap(0))


def of_weights(plan, trajectory, field, memory="retain"):
    """The outputs as a function of the weights."""

    def run(theta):
        return outputs(apply(plan, trajectory, lambda x, s: functional_call(field, theta, (x, s)), memory))

    return run


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def directions(field, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in field.named_parameters()}


def check(plan, trajectory, field, memory, tolerance):
    theta = {name: p.detach() for name, p in field.named_parameters()}
    t = directions(field, 1)
    out, pushed = jvp(of_weights(plan, trajectory, field, memory), (theta,), (t,))
    cs = cotangents(out)
    pulled = grads(outputs(apply(plan, trajectory, field)), list(field.parameters()), cs)
    forward, backward = inner(pushed, cs), inner(t.values(), pulled)
    size = sum(g.norm() ** 2 for g in pulled) ** 0.5 * sum(d.norm() ** 2 for d in t.values()) ** 0.5
    assert abs(forward - backward) <= tolerance * max(float(size), 1e-30)


@given(plans(STEPS), trajectories(FIELD, STEPS, (DIM,), INTERPOLANTS), st.sampled_from(("retain", "recompute")))
@example(leapalign(4, 2, 0.3), ROLLED, "recompute")
@example(DETACHED, ROLLED, "retain")  # tangents pass through no_grad: a stop has to be a real one
def test_the_inner_product_on_an_mlp(plan, trajectory, memory):
    check(plan, trajectory, FIELD, memory, GRADIENT)


@pytest.mark.slow
@pytest.mark.parametrize("make", [flux, sd3])
@given(plan=plans(3, size=6))
def test_the_inner_product_on_transformers(make, plan):
    field = make()
    with sdpa_kernel(SDPBackend.MATH), float64_throughout():
        check(plan, problem(field, 3, (1, *field.shape)).trajectory, field, "retain", GRADIENT)


@pytest.mark.parametrize("make", [flux, sd3])
def test_the_inner_product_on_stock_transformers(make):
    field = make()
    with sdpa_kernel(SDPBackend.MATH):
        check(leapalign(3, 1, 0.3), problem(field, 4, (1, *field.shape)).trajectory, field, "retain", STOCK)


@given(plans(STEPS), trajectories(FIELD, STEPS, (DIM,)), st.sampled_from(("retain", "recompute")))
@example(leapalign(4, 2, 0.3), ROLLED, "recompute")
def test_func_vjp_is_autograd(plan, trajectory, memory):
    theta = {name: p.detach() for name, p in FIELD.named_parameters()}
    out, pull = vjp(of_weights(plan, trajectory, FIELD, memory), theta)
    cs = cotangents(out)
    (pulled,) = pull(tuple(cs))
    expected = grads(outputs(apply(plan, trajectory, FIELD)), list(FIELD.parameters()), cs)
    assert distance(list(pulled.values()), expected) <= GRADIENT


@pytest.mark.parametrize("memory", ["retain", "recompute"])
def test_jacrev_is_jacfwd_and_not_zero(memory):
    plan = Plan(*leapalign(4, 2, 0.3).outputs, latent(3).leap(1, discount=0.5).leap(0, discount=0.25))
    theta = {name: p.detach() for name, p in FIELD.named_parameters()}
    run = of_weights(plan, ROLLED, FIELD, memory)
    for reverse, forward in zip(jacrev(run)(theta), jacfwd(run)(theta), strict=True):
        for name in theta:
            torch.testing.assert_close(reverse[name], forward[name], rtol=GRADIENT, atol=GRADIENT)
            assert reverse[name].abs().max() > 1e-3


def test_a_detached_plan_has_the_tangent_of_its_last_leap():
    """Nothing of the first leap's tangent passes detach."""
    theta = {name: p.detach() for name, p in FIELD.named_parameters()}
    t = directions(FIELD, 3)
    stopped = Plan(latent(4).leap(2).detach().leap(0))
    x = apply(Plan(latent(4).leap(2)), ROLLED, FIELD).detach()
    sigma = ROLLED.sigma(2)
    _, (pushed,) = jvp(of_weights(stopped, ROLLED, FIELD), (theta,), (t,))
    _, expected = jvp(lambda w: -sigma * functional_call(FIELD, w, (x, sigma)), (theta,), (t,))
    torch.testing.assert_close(pushed, expected)


@pytest.mark.parametrize("memory", ["retain", "split"])
def test_sample_has_the_tangent_of_apply(memory):
    """Split fell back to retain with the call's input cut off, and lost the tangent of earlier leaps."""
    theta = {name: p.detach() for name, p in FIELD.named_parameters()}
    plan, t = leapalign(4, 2, 0.3), directions(FIELD, 5)
    p = problem(FIELD, STEPS)

    def run(weights):
        def field(x, sigma):
            return functional_call(FIELD, weights, (x, sigma))

        return sample(plan, field, p.noise.detach(), p.sigmas, memory=memory, check=False)[0]

    _, expected = jvp(of_weights(plan, p.trajectory, FIELD), (theta,), (t,))
    _, pushed = jvp(run, (theta,), (t,))
    torch.testing.assert_close(pushed, expected[0])
    with forward_ad.dual_level():
        dual = run({name: forward_ad.make_dual(w, t[name]) for name, w in theta.items()})
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected[0])
