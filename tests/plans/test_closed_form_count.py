"""Long plans: terms are counted, and listed up to a limit; numbers agree with symbols."""

import time
from fractions import Fraction

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
    assert str(expansion).endswith(" + 1125899906841623 more terms (1125899906842623 in all)")
    assert expansion.latex().endswith(r" + \cdots (+1125899906841623)")
    assert [len(full(50).gradient(limit=n).terms) for n in (0, 10)] == [0, 10]
    assert time.process_time() - start < 10  # measured: 1.5 s


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_fifty_steps_of_any_interpolant_in_symbols_and_numbers(interpolant):
    """Factoring each coefficient separately took 25 s."""
    start = time.process_time()
    sigmas = [1 - i / 50 for i in range(51)]
    expansions = [full(50).gradient(times, interpolant) for times in (None, sigmas)]
    assert {expansion.count for expansion in expansions} == {2**50 - 1}
    assert time.process_time() - start < 10  # measured: 1.9 s
    numbers = {sympy.Symbol(f"sigma_{t}"): 1 - (50 - t) / 50 for t in range(51)}
    for i in (0, 7, 49, 50, 999):
        symbolic, number = (float(e.terms[i].coefficient.subs(numbers)) for e in expansions)
        assert symbolic == pytest.approx(number, rel=1e-9)


def test_advances_over_twelve_supports():
    """Weights written out in symbols took 100 s: they are named symbols that become numbers with the sigmas."""
    start = time.process_time()
    plan = Plan(latent(12).advance(0, [latent(t).velocity() for t in range(12, 0, -1)]))
    sigmas = [Fraction((12 - i) ** 2, 144) for i in range(13)]
    symbolic, numeric = plan.gradient(), plan.gradient(sigmas)
    assert symbolic.count == numeric.count == 12
    assert "w[sigma_5: sigma_12 -> 0] dv(x_5)/dtheta" in str(symbolic)
    assert r"w_{\sigma_{5}}^{\sigma_{12} \to 0} \frac" in symbolic.latex()
    numbers = {sympy.Symbol(f"sigma_{t}"): sympy.Rational(t**2, 144) for t in range(13)}
    for a, b in zip(symbolic.terms, numeric.terms, strict=True):
        assert a.coefficient.subs(numbers) == b.coefficient
    assert sum(term.coefficient for term in numeric.terms) == -1
    assert time.process_time() - start < 10


def test_calls_that_share_supports_and_are_nested_stay_fast():
    """Twelve calls, each advance over three of them, one made at a prediction."""
    x = latent(12)
    for t in (12, 9, 6, 3):
        y = x.leap(t - 1)
        x = x.advance(t - 3, [x.velocity(), y.velocity(), y.leap(t - 2).velocity()])
    start = time.process_time()
    for sigmas in (None, [1 - i / 12 for i in range(13)]):
        assert Plan(x).gradient(sigmas).count == 4095
    assert time.process_time() - start < 10


def test_a_thousand_nodes_are_counted_at_once():
    start = time.process_time()
    expansion = full(500).gradient([1 - i / 500 for i in range(501)], limit=600)
    assert expansion.count == 2**500 - 1
    assert expansion.terms[-1].jacobians == (1,)
    assert time.process_time() - start < 5  # measured: 0.1 s


def test_a_call_reached_by_two_paths_is_one_term():
    v = latent(6).velocity()
    once = latent(6).leap(0, velocity=v)
    plan = Plan(once.renoise(6).leap(0, velocity=v.scale("a")))
    (term,) = plan.gradient([Fraction(6 - i, 12) for i in range(7)]).terms
    assert sympy.simplify(term.coefficient + (Fraction(1, 4) + sympy.Symbol("a") / 2)) == 0
    assert plan.gradient().count == 1


def test_rational_times_give_exact_coefficients():
    sigmas = [1, Fraction(2, 3), Fraction(1, 3), 0]
    coefficients = [term.coefficient for term in leapalign(3, 1, 0.3).gradient(sigmas).terms]
    assert coefficients == [sympy.Rational(-1, 3), sympy.Rational(-2, 3), sympy.Rational(1, 15)]
    advance = Plan(latent(3).advance(0, [latent(t).velocity() for t in (3, 2, 1)])).gradient(sigmas)
    assert [term.coefficient for term in advance.terms] == [sympy.Rational(-3, 4), sympy.Rational(-1, 4)]
    (cosine, *_) = leapalign(2, 1).gradient([1, Fraction(1, 3), 0], Trigonometric()).terms
    assert cosine.coefficient == -1 / sympy.pi  # -2/pi sin(pi/6)


def test_a_limit_below_zero_is_refused():
    with pytest.raises(PlanError, match=r"limit=-1.*0 or more"):
        full(3).gradient(limit=-1)


def test_an_expansion_with_hidden_terms_is_not_evaluated(rolled):
    with pytest.raises(PlanError, match=r"255 terms, 9 of them listed.*limit=255"):
        full(8).gradient(limit=9).evaluate(rolled.trajectory, rolled.field, rolled.trajectory[0])


def test_names_are_bound_before_evaluation(rolled):
    with pytest.raises(PlanError, match="alpha"):
        leapalign(5, 2, "alpha").gradient().evaluate(rolled.trajectory, rolled.field, rolled.trajectory[0])


def test_an_expansion_of_another_interpolant_is_not_evaluated(rolled):
    """With another interpolant its coefficients were wrong without an error."""
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


def test_names_may_stay_beside_numeric_sigmas():
    (first, _, nested) = leapalign(3, 1, "alpha").gradient(sigmas=SIGMAS).terms
    assert float(first.coefficient) == pytest.approx(-0.12)
    assert nested.coefficient.free_symbols == {sympy.Symbol("alpha")}


@given(plans(STEPS, size=6))
def test_symbolic_coefficients_with_numbers_substituted_are_the_numeric_ones(plan):
    numbers = {sympy.Symbol(f"sigma_{t}"): sympy.Float(SIGMAS[STEPS - t]) for t in range(STEPS + 1)}
    numbers[sympy.Symbol("T")] = sympy.Float(SIGMAS[0])
    symbolic = plan.gradient(limit=40)
    substituted = {(term.output, term.calls): float(term.coefficient.subs(numbers)) for term in symbolic.terms}
    numeric = {(t.output, t.calls): float(t.coefficient) for t in plan.gradient(SIGMAS, limit=100_000).terms}
    for key, value in substituted.items():
        assert value == pytest.approx(numeric.get(key, 0.0), rel=1e-9, abs=1e-12)


@given(plans(STEPS))
def test_the_count_is_the_number_of_terms(plan):
    expansion = plan.gradient(SIGMAS, limit=100_000)
    assert expansion.count == len(expansion.terms)
    assert len({(term.output, term.calls) for term in expansion.terms}) == expansion.count


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_noise_has_its_terms(interpolant):
    """The terms of x_T, straight and through the call, beside the term of the parameters."""
    expansion = Plan(noise().leap(0)).gradient(interpolant=interpolant)
    calls = {tuple(call.op for call in term.calls) for term in expansion.terms}
    assert calls == {("velocity",), ("noise",), ("velocity", "noise")}
    assert "\ndx_0/dx_T = " in str(expansion)
