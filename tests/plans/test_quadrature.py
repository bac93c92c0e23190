"""The weights of advance: polynomials are integrated exactly, symbols agree with numbers, rules with each other."""

import numpy as np
import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.builders.closed_form_witness import quadrature
from tests.builders.problems import problem
from tests.tolerances import QUADRATURE
from trajsurgery import Plan, latent, recorded, values
from trajsurgery.plans.interpolants import weights
from trajsurgery.testing import MLP

SUPPORTS = st.lists(st.integers(0, 20), unique=True, min_size=1, max_size=4).map(lambda n: [i / 20 for i in n])
ENDS = st.integers(0, 20).map(lambda i: i / 20)


@given(SUPPORTS, ENDS, ENDS)
@example([1.0, 0.5], 1.0, 0.0)
def test_weights_are_those_of_an_independent_quadrature(supports, start, to):
    computed = weights("lagrange", supports, start, to)
    assert computed == pytest.approx(quadrature("lagrange", supports, start, to), rel=QUADRATURE, abs=1e-11)
    assert weights("adams-bashforth", supports, start, to) == computed


@given(SUPPORTS, ENDS, ENDS, st.lists(st.integers(-3, 3), min_size=1, max_size=4))
def test_polynomials_are_integrated_exactly(supports, start, to, coefficients):
    polynomial = np.polynomial.Polynomial(coefficients[: len(supports)])
    integral = sum(w * polynomial(s) for w, s in zip(weights("lagrange", supports, start, to), supports, strict=True))
    area = polynomial.integ()
    assert integral == pytest.approx(area(to) - area(start), rel=QUADRATURE, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_symbolic_weights_are_integrals_of_the_lagrange_basis(count):
    s, start, to = sympy.symbols("s start to")
    supports = sympy.symbols(f"s1:{count + 1}")
    symbolic = weights("lagrange", supports, start, to)
    for i, w in enumerate(symbolic):
        basis = sympy.prod([(s - m) / (supports[i] - m) for n, m in enumerate(supports) if n != i])
        assert sympy.simplify(w - sympy.integrate(sympy.expand(basis), (s, start, to))) == 0


def test_well_known_weights():
    """Closed forms: Euler's, the trapezoid's, Simpson's, two-step Adams-Bashforth's."""
    assert weights("lagrange", [1.0], 1.0, 0.0) == pytest.approx([-1.0])
    assert weights("lagrange", [1.0, 0.0], 1.0, 0.0) == pytest.approx([-0.5, -0.5])
    assert weights("lagrange", [1.0, 0.5, 0.0], 1.0, 0.0) == pytest.approx([-1 / 6, -4 / 6, -1 / 6])
    assert weights("adams-bashforth", [0.5, 0.75], 0.5, 0.25) == pytest.approx([-0.375, 0.125])
    assert weights("euler", [1.0, 0.7, 0.2], 1.0, 0.0) == pytest.approx([-0.3, -0.5, -0.2])


@given(st.lists(st.integers(1, 20), unique=True, min_size=1, max_size=5))
def test_the_weights_of_every_rule_add_up_to_the_interval(places):
    supports = sorted((i / 20 for i in places), reverse=True)
    for rule in ("lagrange", "euler"):
        assert sum(weights(rule, supports, supports[0], 0.0)) == pytest.approx(-supports[0], abs=1e-9)


def euler_steps(p, start, supports, to):
    """Euler steps along the recorded velocities."""
    x, at = p.trajectory[start], start
    for t, after in zip(supports, [*supports[1:], to], strict=True):
        x = x + (p.trajectory.sigma(after) - p.trajectory.sigma(t)) * p.trajectory.velocity(t)
        at = after
    assert at == to
    return x


@pytest.mark.parametrize("order", [(6, 5, 3), (3, 6, 5)])
def test_the_order_of_the_supports_does_not_matter(order):
    p = problem(MLP(4, seed=3))
    x_1 = values(
        Plan(latent(8).leap(6).connect().advance(1, [recorded(t) for t in order], "euler")), p.trajectory, p.field
    )
    torch.testing.assert_close(x_1, euler_steps(p, 6, (6, 5, 3), 1))


def test_euler_over_every_step_is_the_rollout():
    p = problem(MLP(4, seed=3))
    x = latent(8).leap(7).connect()
    plan = Plan(x.advance(0, [recorded(t) for t in range(7, 0, -1)], "euler"))
    torch.testing.assert_close(values(plan, p.trajectory, p.field), p.trajectory[0])
