"""The paper's equations, symbolically: Eq. 8, 10, 14, and how they are written."""

import pytest
import sympy

from trajsurgery import Plan, draft_lv, drtune, latent, leapalign, leaps, recorded, refl
from trajsurgery.testing import INTERPOLANTS

k, j, alpha = sympy.symbols("k j alpha")


def table(plan, **options) -> dict:
    """{(times of the jacobians, source): coefficient}."""
    terms = plan.gradient(**options).terms
    coefficients = {(term.jacobians, term.source): term.coefficient for term in terms}
    assert len(coefficients) == len(terms)
    return coefficients


def same(actual: dict, expected: dict) -> bool:
    return set(actual) == set(expected) and all(sympy.simplify(actual[key] - expected[key]) == 0 for key in expected)


def nested_only(k, j, alpha) -> Plan:
    """Eq. 14: the straight path from k is stopped, the nested one stays."""
    x_j = latent(k).leap(j).connect()
    return Plan(x_j.detach().leap(0, velocity=x_j.discount(alpha).velocity()).connect())


def test_eq_10():
    expected = {((), "j"): -j, ((), "k"): -(k - j), (("j",), "k"): alpha * j * (k - j)}
    assert same(table(leapalign("k", "j", "alpha")), expected)


def test_eq_8_is_eq_10_with_alpha_one():
    expected = {((), "j"): -j, ((), "k"): -(k - j), (("j",), "k"): j * (k - j)}
    assert same(table(leapalign("k", "j", 1.0)), expected)
    assert same(table(Plan(latent("k").leap("j").connect().leap(0).connect())), expected)


def test_eq_14():
    expected = {((), "j"): -j, (("j",), "k"): alpha * j * (k - j)}
    assert same(table(nested_only("k", "j", "alpha")), expected)


def test_alpha_zero_drops_the_nested_term():
    assert same(table(leapalign("k", "j", 0)), {((), "j"): -j, ((), "k"): -(k - j)})


def test_bound_times_are_sigmas_and_the_image_is_zero():
    s5, s2 = sympy.symbols("sigma_5 sigma_2")
    assert same(table(leapalign(5, 2, "alpha")), {((), 2): -s2, ((), 5): s2 - s5, ((2,), 5): alpha * s2 * (s5 - s2)})
    with_numbers = table(leapalign(2, 1, 0.5), sigmas=[1.0, 0.5, 0.0])
    assert with_numbers == pytest.approx({((), 1): -0.5, ((), 2): -0.5, ((1,), 2): 0.125})


def test_closed_forms_of_the_other_methods():
    s = {t: sympy.Symbol(f"sigma_{t}") for t in range(1, 6)}
    t = sympy.Symbol("t")
    assert same(table(refl("t")), {((), "t"): -t})
    assert same(table(drtune(5, 2, {4, 2, 1})), {((), 4): s[3] - s[4], ((), 2): -s[2]})
    lines = draft_lv(2).gradient()
    assert [(term.output, term.coefficient, term.source) for term in lines.terms] == [(i, -s[1], 1) for i in range(3)]


def test_three_leaps_have_seven_terms():
    a, b, c = sympy.symbols("a b c")
    coefficients = table(leaps(("a", "b", "c"), "alpha"))
    assert len(coefficients) == 7
    assert sympy.simplify(coefficients[("c", "b"), "a"] + alpha**2 * c * (b - c) * (a - b)) == 0


def test_terms_come_by_order_of_nesting():
    orders = [term.order for term in leaps((6, 5, 3, 2), 0.5).gradient().terms]
    assert orders == sorted(orders)
    assert [orders.count(n) for n in range(4)] == [4, 6, 4, 1]


def test_like_terms_are_merged():
    """Two paths from one call to the output are one term."""
    x = latent("k")
    merged = table(Plan(x.leap("j").leap(0, velocity=recorded("j"))))
    assert same(merged, {((), "k"): j - k})
    v = x.velocity()
    two_paths = Plan(x.leap("j", velocity=v).advance(0, [latent("j").velocity(), v]))
    (coefficient,) = [c for (jacobians, source), c in table(two_paths).items() if source == "k"]
    weight = sympy.integrate((sympy.Symbol("s") - j) / (k - j), (sympy.Symbol("s"), j, 0))
    assert sympy.simplify(coefficient - (-(k - j) + weight)) == 0


def test_a_stopped_call_has_no_term():
    assert same(table(Plan(latent("k").leap("j").detach().leap(0))), {((), "j"): -j})
    assert same(
        table(Plan(latent("k").leap("j").leap(0, velocity=latent("j").velocity().detach()))), {((), "k"): j - k}
    )
    assert same(table(Plan(latent("k").leap(0, velocity=latent("k").velocity().scale(3)))), {((), "k"): -3 * k})


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_straight_paths_multiply_by_a(interpolant):
    """On interpolants other than rectified flow the straight path from k has a factor A."""
    coefficients = table(Plan(latent("k").leap("j").leap(0, discount="alpha")), interpolant=interpolant)
    a, b = interpolant.leap(j, sympy.Integer(0), sympy)
    _, b_first = interpolant.leap(k, j, sympy)
    assert same(coefficients, {((), "j"): b, ((), "k"): a * b_first, (("j",), "k"): alpha * b * b_first})


def test_how_eq_10_is_written():
    assert str(leapalign("k", "j", "alpha").gradient()) == (
        "dx_0/dtheta = - j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + alpha j (k - j) dv/dx_j dv(x_k)/dtheta"
    )
    latex = leapalign("k", "j", "alpha").gradient().latex()
    assert latex.startswith(r"\frac{\partial x_{0}}{\partial\theta} = - j \frac{\partial v_\theta(x_{j})}")
    assert r"+ \alpha j \left(k - j\right)" in latex


def test_two_outputs_are_two_lines():
    assert len(str(draft_lv(1).gradient()).splitlines()) == 2
    assert len(draft_lv(1).gradient().latex().splitlines()) == 2
