"""Eq. 10 on real transformers: at 1e-10 where all is float64, at 1e-6 on the stock classes, which cast inside."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.builders.closed_form_witness import Witness
from tests.builders.problems import cotangents, distance, grads, outputs
from tests.builders.small_transformers import float64_throughout, flux, sd3
from tests.tolerances import GRADIENT, STOCK
from trajsurgery import Plan, apply, latent, rollout
from trajsurgery.plans.graph import trained
from trajsurgery.testing import plans, sigmas

STEPS = 4
RUNS = st.tuples(plans(STEPS, size=6), sigmas(STEPS), st.integers(1, 2), st.integers(0, 2**16))


def twelve() -> Plan:
    """Four times from 3 to 0: twelve calls, single-step and nested terms up to the fourth order."""
    x = latent(3)
    for draw in range(4):
        x = x if x.t else x.renoise(3, draw)
        x = x.leap(2, velocity=x.detach().velocity()).connect()
        x = x.leap(1, velocity=x.detach().velocity())
        x = x.leap(0, discount=0.5)
    return Plan(x)


LONGEST = (twelve(), [1.0, 0.8, 0.5, 0.2, 0.0], 2, 0)


def error(field, run) -> float:
    """The distance between autograd's gradient and the closed form."""
    plan, times, batch, seed = run
    noise = torch.randn(batch, *field.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    trajectory = rollout(field, noise.requires_grad_(), torch.tensor(times, dtype=torch.float64))
    out = outputs(apply(plan, trajectory, field))
    cs = cotangents(out)
    terms = plan.gradient(times).terms
    closed = Witness(plan, trajectory, {None: field}).gradient(terms, [float(term.coefficient) for term in terms], cs)
    return distance(grads(out, [*field.parameters(), noise], cs), closed)


@pytest.mark.slow
@given(RUNS)
@example(LONGEST)
def test_autograd_is_the_closed_form_on_flux_in_float64(run):
    with float64_throughout():
        assert error(flux(), run) <= GRADIENT


@pytest.mark.slow
@given(RUNS)
@example(LONGEST)
def test_autograd_is_the_closed_form_on_sd3_in_float64(run):
    with float64_throughout():
        assert error(sd3(), run) <= GRADIENT


@pytest.mark.slow
@given(RUNS)
@example(LONGEST)
def test_autograd_is_the_closed_form_on_stock_flux(run):
    assert error(flux(), run) <= STOCK


@pytest.mark.slow
@given(RUNS)
@example(LONGEST)
def test_autograd_is_the_closed_form_on_stock_sd3(run):
    assert error(sd3(), run) <= STOCK


def test_the_longest_run_has_twelve_calls():
    (plan, *_) = LONGEST
    assert sum(node.op == "velocity" for node in trained(plan.outputs)) == 12
    orders = [term.order for term in plan.gradient().terms]
    assert set(orders) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("make", [flux, sd3])
def test_the_patch_changes_rounding_only(make):
    field = make()
    x = torch.randn(2, *field.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stock = field(x, torch.tensor(0.7))
    with float64_throughout():
        patched = field(x, torch.tensor(0.7))
    assert not torch.equal(stock, patched)
    torch.testing.assert_close(stock, patched, rtol=STOCK, atol=STOCK)
    assert field(1.5 * x, torch.tensor(0.7)).sub(stock).abs().mean() > 0.1  # the field is not linear
