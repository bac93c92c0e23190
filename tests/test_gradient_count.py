"""Long plans: terms are counted, and listed up to a limit; numbers agree with symbols."""

import time

import pytest
import sympy
from hypothesis import given

from trajsurgery import Plan, PlanError, Trigonometric, latent, leapalign, noise
from trajsurgery.testing import INTERPOLANTS, plans

SIGMAS = (1.0, 0.83, 0.7, 0.41, 0.12, 0.0)
STEPS = len(SIGMAS) - 1


def full(steps: int) -> Plan:
    """Backpropagation through every step."""
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.leap(t - 1)
    return Plan(x)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_full_backpropagation_has_a_term_for_every_set_of_calls(steps):
    expansion = full(steps).gradient()
    assert expansion.count == 2**steps - 1 == len(expansion.terms)
    assert len({term.calls for term in expansion.terms}) == expansion.count


def test_fifty_steps_are_counted_and_not_listed():
    start = time.perf_counter()
    expansion = full(50).gradient()
    assert expansion.count == 2**50 - 1
    assert len(expansion.terms) == 1000
    assert [term.order for term in expansion.terms[:51]] == [0] * 50 + [1]
    assert "more terms" in str(expansion)
    assert len(full(50).gradient(limit=10).terms) == 10
    assert time.perf_counter() - start < 20


def test_an_expansion_with_hidden_terms_is_not_evaluated(rolled):
    with pytest.raises(PlanError, match=r"255 terms, 9 of them listed.*limit=255"):
        full(8).gradient(limit=9).evaluate(rolled.trajectory, rolled.field, rolled.trajectory[0])


def test_names_are_bound_before_evaluation(rolled):
    with pytest.raises(PlanError, match="alpha"):
        leapalign(5, 2, "alpha").gradient().evaluate(rolled.trajectory, rolled.field, rolled.trajectory[0])


def test_an_expansion_fits_its_interpolant(rolled):
    """On another one its coefficients were wrong, silently."""
    expansion = leapalign(5, 2, 0.3).gradient(interpolant=Trigonometric())
    with pytest.raises(PlanError, match=r"Trigonometric.*RectifiedFlow"):
        expansion.evaluate(rolled.trajectory, rolled.field, rolled.trajectory[0])


def test_times_above_the_sampler_s_are_refused():
    with pytest.raises(PlanError) as err:
        leapalign(9, 2).gradient(sigmas=SIGMAS)
    assert err.value.rules == ("time-range",)
    with pytest.raises(PlanError) as err:
        Plan(latent(2).leap(0), steps=3).gradient(sigmas=SIGMAS)
    assert err.value.rules == ("steps",)


def test_names_may_stay_where_numbers_are_given():
    (first, _, nested) = leapalign(3, 1, "alpha").gradient(sigmas=SIGMAS).terms
    assert float(first.coefficient) == pytest.approx(-0.12)
    assert nested.coefficient.free_symbols == {sympy.Symbol("alpha")}


@given(plans(STEPS, size=6))
def test_symbols_with_numbers_put_in_are_the_numbers(plan):
    numbers = {sympy.Symbol(f"sigma_{t}"): sympy.Float(SIGMAS[STEPS - t]) for t in range(STEPS + 1)}
    numbers[sympy.Symbol("T")] = sympy.Float(SIGMAS[0])
    symbolic = plan.gradient(limit=40)
    found = {(term.output, term.calls): float(term.coefficient.subs(numbers)) for term in symbolic.terms}
    wanted = {(t.output, t.calls): float(t.coefficient) for t in plan.gradient(SIGMAS, limit=100_000).terms}
    for key, value in found.items():
        assert value == pytest.approx(wanted.get(key, 0.0), rel=1e-9, abs=1e-12)


@given(plans(STEPS))
def test_the_count_is_the_number_of_terms(plan):
    expansion = plan.gradient(SIGMAS, limit=100_000)
    assert expansion.count == len(expansion.terms)
    assert len({(term.output, term.calls) for term in expansion.terms}) == expansion.count


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_noise_has_terms_of_its_own(interpolant):
    """x_T, straight and through the call; and the call's own parameters."""
    expansion = Plan(noise().leap(0)).gradient(interpolant=interpolant)
    found = {tuple(call.op for call in term.calls) for term in expansion.terms}
    assert found == {("velocity",), ("noise",), ("velocity", "noise")}
    assert "dx_T/dx_T" in str(expansion)
