"""Interpolants, quadratures and closed forms against values by hand: coefficients, order, number and text."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given

from tests.builders.linear_field import X3, Counted
from trajsurgery import (
    Plan,
    PlanError,
    Polynomial,
    RectifiedFlow,
    Trigonometric,
    latent,
    leapalign,
    noise,
    recorded,
    rollout,
)
from trajsurgery.plans.derivatives import QuadratureWeight, simplify
from trajsurgery.plans.graph import passes_gradient
from trajsurgery.plans.interpolants import Interpolant, weights
from trajsurgery.plans.nodes import Node, Noise, Velocity
from trajsurgery.testing import plans

SIGMAS = [1.0, 0.75, 0.5, 0.0]
S = dict(zip("kjts", sympy.symbols("k j t s"), strict=True))


def test_coefficients_of_interpolants() -> None:
    half, pi = sympy.Rational(1, 2), sympy.pi
    for path, t, alpha, beta, alpha_rate, beta_rate in (
        (RectifiedFlow(), half, half, half, -1, 1),
        (Trigonometric(), half, sympy.sqrt(2) / 2, sympy.sqrt(2) / 2, -pi * sympy.sqrt(2) / 4, pi * sympy.sqrt(2) / 4),
        (Polynomial(), sympy.Rational(1, 3), sympy.Rational(8, 9), sympy.Rational(1, 3), -sympy.Rational(2, 3), 1),
    ):
        shares = zip(path.shares(t, sympy), (alpha, beta, alpha_rate, beta_rate), strict=True)
        assert [sympy.simplify(a - b) for a, b in shares] == [0] * 4
        assert (path.alpha(t, sympy), path.beta(t, sympy)) == path.shares(t, sympy)[:2]
    for path, leap in (
        (RectifiedFlow(), (1, -0.5)),
        (Trigonometric(), (2**-0.5, -(2**0.5) / torch.pi)),
        (Polynomial(), ((1 - 0.0625 + 0.375) / (1 + 0.5625), ((1 - 0.5625) * 0.25 - 0.75 * (1 - 0.0625)) / 1.5625)),
    ):
        assert path.leap(0.75, 0.25) == pytest.approx(leap, rel=1e-13)
        assert Interpolant.leap(path, 0.75, 0.25) == pytest.approx(leap, rel=1e-13)


def test_weights_of_advances() -> None:
    assert weights("euler", [1.0, 0.75, 0.5], 1.0, 0.0) == [-0.25, -0.25, -0.5]
    assert weights("lagrange", [0.75], 0.75, 0.25) == [-0.5]
    # through (1, 1/2): v(s) = (2 s - 1) v_1 + (2 - 2 s) v_2, integrated from 1 to 0
    assert weights("lagrange", [1.0, 0.5], 1.0, 0.0) == pytest.approx([0, -1], abs=1e-14)
    assert weights("adams-bashforth", [0.5, 1.0], 0.5, 0.0) == pytest.approx([-0.75, 0.25], rel=1e-13)
    # Simpson's
    assert weights("lagrange", [1.0, 0.5, 0.0], 1.0, 0.0) == pytest.approx([-1 / 6, -4 / 6, -1 / 6], rel=1e-13)
    # four supports: 3/8
    assert weights("lagrange", [1.0, 2 / 3, 1 / 3, 0.0], 1.0, 0.0) == pytest.approx([-0.125, -0.375, -0.375, -0.125])


def table(plan: Plan, **options: Any) -> list[tuple[Any, ...]]:
    return [(t.output, t.jacobians, t.source, t.coefficient) for t in plan.gradient(**options).terms]


def test_terms_in_their_order() -> None:
    k, j, a = sympy.symbols("k j a")
    s1, s2, s3 = sympy.symbols("sigma_1 sigma_2 sigma_3")
    rows = table(leapalign("k", "j", "a"))
    assert [row[:3] for row in rows] == [(0, (), "j"), (0, (), "k"), (0, ("j",), "k")]
    assert [sympy.expand(row[3] - c) for row, c in zip(rows, (-j, j - k, a * j * (k - j)), strict=True)] == [0, 0, 0]
    numbers = table(leapalign(3, 1, 0.25), sigmas=SIGMAS)
    assert numbers == [(0, (), 1, -0.5), (0, (), 3, -0.5), (0, (1,), 3, 0.0625)]
    plan = Plan(latent(2).leap(1).recover("rollout"), latent(0).renoise(3).velocity().x.leap(1))
    assert [
        sympy.simplify(row[3] - c) for row, c in zip(table(plan), ((s1 - s2) / (1 - s1), s1 - s3), strict=True)
    ] == [0, 0]
    straight = table(Plan(noise().leap(1).connect().leap(0)))
    assert [row[:3] for row in straight] == [
        *((0, (), 1), (0, (), "T"), (0, (), "T")),
        *((0, (1,), "T"), (0, (1,), "T"), (0, ("T",), "T"), (0, (1, "T"), "T")),
    ]
    up = table(Plan(latent(3).leap(0).renoise(2).leap(0)), interpolant=Trigonometric(), sigmas=[1, 0.5, 0.25, 0])
    a2 = float(sympy.cos(sympy.pi * 0.5 / 2))
    assert float(up[1][3]) == pytest.approx(-2 / float(sympy.pi) * a2 * float(sympy.cos(sympy.pi / 4)), rel=1e-13)


def test_kinds_and_orders_of_terms() -> None:
    terms = Plan(latent(4).leap(3).leap(2).leap(1).leap(0)).gradient().terms
    assert [term.order for term in terms] == [0] * 4 + [1] * 6 + [2] * 4 + [3]
    assert [terms[i].kind for i in (0, 4, 10, 14)] == ["single-step", "nested once", "nested twice", "nested 3 times"]
    assert Plan(noise().leap(0)).gradient().terms[-1].kind in ("straight", "nested once")
    assert [t.kind for t in Plan(noise().leap(0)).gradient().terms] == ["single-step", "straight", "nested once"]


def test_terms_are_counted_listed_and_limited() -> None:
    plan = Plan(latent(4).leap(3).leap(2).leap(1).leap(0))
    whole = plan.gradient()
    assert whole.count == len(whole.terms) == 15
    some = plan.gradient(limit=3)
    assert (some.count, len(some.terms)) == (15, 3)
    assert plan.gradient(limit=0).terms == []
    with pytest.raises(PlanError, match=r"15 terms, 3 of them listed.*limit=15"):
        some.evaluate(rollout(Counted(), torch.ones(1, 1, dtype=torch.float64), [1.0, 0.75, 0.5, 0.25, 0.0]), None, X3)
    assert len(plan.gradient(limit=15).terms) == 15
    two = Plan(latent(2).leap(0), latent(1).leap(0), latent(3).leap(1).leap(0))
    assert two.gradient().count == len(two.gradient().terms) == 5


def test_terms_of_one_call_are_merged_and_may_cancel() -> None:
    """v_2 reaches the output by two paths: through an advance and through the leap before it."""
    s0, s1, s2 = sympy.Integer(0), *sympy.symbols("sigma_1 sigma_2")
    v = latent(2).velocity()
    merged = Plan(latent(2).leap(1, velocity=v).advance(0, [latent(1).velocity(), v])).gradient()
    assert merged.count == len(merged.terms) == 2
    twice = next(term for term in merged.terms if term.source == 2)
    expected = (s1 - s2) + sympy.integrate(*_line(s2, s1, s1, s0))
    assert sympy.simplify(twice.coefficient - expected) == 0
    cancels = Plan(
        latent(2).advance(1, [v], "euler").advance(0, [recorded(1), v.scale(1)], "lagrange"), latent(1).leap(0)
    ).gradient(sigmas=[1.0, 0.5, 0.25, 0.0])
    assert cancels.count == len(cancels.terms)


def _line(at: Any, other: Any, start: Any, to: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    s = S["s"]
    return (s - other) / (at - other), (s, start, to)


def test_short_coefficients_are_factored_and_long_ones_are_not() -> None:
    k, j = sympy.symbols("k j")
    assert str(simplify(k * j - k**2)) == "k*(j - k)"
    assert simplify(0.5) == 0.5
    assert simplify(3) == 3
    names = sympy.symbols("a:i")
    few, many = sum(k * a for a in names[:7]), sum(k * a for a in names[:8])
    assert (len(few.free_symbols), len(many.free_symbols)) == (8, 9)
    assert isinstance(simplify(few), sympy.Mul)
    assert isinstance(simplify(many), sympy.Add)
    short, long = (sum(k**n * j for n in range(1, count + 1)) for count in (60, 61))
    assert isinstance(simplify(short), sympy.Mul)
    assert isinstance(simplify(long), sympy.Add)


def test_weights_of_up_to_three_supports_are_written_out() -> None:
    v = {t: latent(t).velocity() for t in (4, 3, 2, 1)}
    three, four = (latent(4).advance(0, [v[t] for t in times]) for times in ((4, 3, 2), (4, 3, 2, 1)))
    assert not any(term.coefficient.has(QuadratureWeight) for term in Plan(three).gradient().terms)
    terms = Plan(four).gradient().terms
    assert all(isinstance(term.coefficient, QuadratureWeight) for term in terms)
    assert str(terms[0].coefficient) == "w[sigma_1: sigma_4 -> 0]"
    assert sympy.latex(terms[0].coefficient) == r"w_{\sigma_{1}}^{\sigma_{4} \to 0}"
    euler = Plan(latent(4).advance(0, list(v.values()), "euler")).gradient().terms
    assert {term.source: str(term.coefficient) for term in euler}[4] in ("sigma_3 - sigma_4", "-(sigma_4 - sigma_3)")
    times = [1.0, 2 / 3, 1 / 3, 1 / 6, 0.0]
    coefficients = {term.source: float(term.coefficient) for term in Plan(four).gradient(sigmas=times).terms}
    substituted = {term.source: float(term.coefficient) for term in Plan(four).gradient().numbers(times).terms}
    expected = dict(zip((4, 3, 2, 1), weights("lagrange", times[:4], 1.0, 0.0), strict=True))
    assert coefficients == pytest.approx(expected, rel=1e-12)
    assert substituted == pytest.approx(expected, rel=1e-12)


def test_supports_are_sorted_by_time_and_names_keep_their_order() -> None:
    """Euler uses each velocity down to the time of the next support, whatever their order."""
    v = {t: latent(t).velocity() for t in (3, 2, 1)}
    for order in ((3, 2, 1), (1, 2, 3), (2, 3, 1)):
        terms = Plan(latent(3).advance(0, [v[t] for t in order], "euler")).gradient(sigmas=SIGMAS).terms
        assert {term.source: float(term.coefficient) for term in terms} == {3: -0.25, 2: -0.25, 1: -0.5}
    top = latent("T").velocity()
    for velocities in ([top, v[2]], [v[2], top]):
        plan = Plan(latent("T").advance(0, velocities, "euler"))
        coefficients = {str(term.source): term.coefficient for term in plan.gradient(sigmas=SIGMAS).terms}
        assert {name: float(c) for name, c in coefficients.items()} == {"T": -0.25, "2": -0.75}
    a, b = sympy.symbols("a b")
    named = Plan(latent("a").advance(0, [latent("a").velocity(), latent("b").velocity()], "euler")).gradient().terms
    assert {term.source: sympy.expand(term.coefficient) for term in named} == {"a": b - a, "b": -b}


def test_factors_among_floats_symbols_and_fractions() -> None:
    half, whole, name = (latent(2).leap(0, velocity=latent(2).velocity().scale(a)) for a in (0.3, 2.0, "a"))
    exact = [1, Fraction(1, 2), 0]
    assert str(Plan(half).gradient(sigmas=exact).terms[0].coefficient) == "-3/10"
    assert str(Plan(whole).gradient(sigmas=exact).terms[0].coefficient) == "-2"
    assert Plan(half).gradient(sigmas=[1.0, 0.5, 0.0]).terms[0].coefficient == pytest.approx(-0.3)
    assert str(Plan(whole).gradient().terms[0].coefficient) == "-2*sigma_2"
    assert str(Plan(name).gradient().terms[0].coefficient) == "-a*sigma_2"
    assert str(Plan(half).gradient().terms[0].coefficient) == "-0.3*sigma_2"
    assert isinstance(Plan(whole).gradient(sigmas=exact).terms[0].coefficient, sympy.Integer)
    assert isinstance(Plan(whole).gradient(sigmas=[1.0, 0.5, 0.0]).terms[0].coefficient, sympy.Float)


def test_a_number_times_a_difference_stays_a_product() -> None:
    texts = [str(term.coefficient) for term in leapalign("k", "j", 0.5).gradient().terms]
    assert texts[0] == "-j"
    assert texts[2] == "0.5*j*(k - j)" or sympy.expand(sympy.sympify(texts[2]) - sympy.sympify("0.5*j*(k-j)")) == 0
    assert str(leapalign("k", "j", 0.5).gradient()) == (
        "dx_0/dtheta = - j dv(x_j)/dtheta - (k - j) dv(x_k)/dtheta + 0.5 j (k - j) dv/dx_j dv(x_k)/dtheta"
    )


def test_numbers_replace_symbols() -> None:
    plan = leapalign(3, 1, 0.25)
    substituted = plan.gradient().numbers(SIGMAS)
    assert [float(term.coefficient) for term in substituted.terms] == [-0.5, -0.5, 0.0625]
    assert substituted.count == 3
    exact = plan.gradient(sigmas=[1, sympy.Rational(3, 4), sympy.Rational(1, 2), 0])
    assert [str(term.coefficient) for term in exact.terms] == ["-1/2", "-1/2", "1/16"]


def test_a_term_that_vanishes_at_the_sampler_s_times_stays_as_a_zero() -> None:
    """From k to 0 through velocities at k and k / 2 the trapezoid is the midpoint rule."""
    expansion = Plan(latent("k").advance(0, [latent("k").velocity(), latent("j").velocity()])).gradient()
    numeric = Plan(latent(2).advance(0, [latent(2).velocity(), latent(1).velocity()])).gradient()
    assert expansion.count == 2
    coefficients = [float(term.coefficient) for term in numeric.numbers([1.0, 0.5, 0.0]).terms]
    assert sorted(coefficients) == [-1.0, 0.0]


def test_an_interpolant_says_its_shares() -> None:
    with pytest.raises(TypeError, match="shares"):
        Interpolant()  # pyright: ignore[reportAbstractUsage]


def chains(node: Node) -> Counter[tuple[Node, ...]]:
    """The chains of calls below a node, the output side first, each once for every way to it; none cancels here."""
    if isinstance(node, Velocity):
        return Counter([(node,)]) + Counter({(node, *chain): n for chain, n in chains(node.x).items()})
    if isinstance(node, Noise):
        return Counter([(node,)])
    ways = node.parents if passes_gradient(node) else ()
    return sum((chains(parent) for parent in ways), Counter[tuple[Node, ...]]())


@given(plans(5, ops=("leap", "velocity", "connect", "discount", "detach", "scale", "renoise", "noise"), outputs=1))
def test_the_terms_are_the_chains_of_calls_and_their_number_is_counted(plan: Plan) -> None:
    """With random times nothing cancels: every chain is a term, the like ones are merged."""
    expected = chains(plan.outputs[0])
    expansion = plan.gradient()
    assert expansion.count == len(expansion.terms) == len(expected)
    assert {term.calls for term in expansion.terms} == set(expected)
    short = plan.gradient(limit=1)
    assert (short.count, len(short.terms)) == (len(expected), 1)
    assert (f"{len(expected)} in all" in str(short)) == (len(expected) > 1)
