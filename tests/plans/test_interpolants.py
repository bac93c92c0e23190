"""Interpolants: the finite form of Eq. 20 against every closed form, at both ends, in every arithmetic."""

import math
from itertools import pairwise

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from trajsurgery import Polynomial, RectifiedFlow, Trigonometric
from trajsurgery.plans.interpolants import Interpolant
from trajsurgery.testing import INTERPOLANTS, Gaussian

TIMES = st.floats(0, 1)
k, j, t = sympy.symbols("k j t", real=True)


def closed(interpolant, a, b):
    """A and B of each interpolant in closed form, derived by hand."""
    match interpolant:
        case RectifiedFlow():
            return 1, -(a - b)
        case Trigonometric():
            return math.cos(math.pi * (a - b) / 2), -(2 / math.pi) * math.sin(math.pi * (a - b) / 2)
        case Polynomial():
            return (1 - b * b + 2 * a * b) / (1 + a * a), ((1 - a * a) * b - a * (1 - b * b)) / (1 + a * a)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
@given(TIMES, TIMES)
def test_all_forms_of_a_leap_agree(interpolant, a, b):
    expected = pytest.approx(closed(interpolant, a, b), rel=1e-12, abs=1e-14)
    assert interpolant.leap(a, b) == expected
    assert Interpolant.leap(interpolant, a, b) == expected
    tensors = interpolant.leap(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), torch)
    assert [float(x) for x in tensors] == expected
    symbols = interpolant.leap(k, j, sympy)
    assert [float(sympy.sympify(x).subs({k: a, j: b})) for x in symbols] == expected


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_the_finite_form_is_the_closed_form_symbolically(interpolant):
    for mine, general in zip(interpolant.leap(k, j, sympy), Interpolant.leap(interpolant, k, j, sympy), strict=True):
        assert sympy.simplify(sympy.sympify(mine - general)) == 0


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_the_finite_form_is_eq_20_where_that_is_finite(interpolant):
    """Eq. 20 as printed, divided by alpha_k."""
    (a_k, b_k, rate_a, rate_b), (a_j, b_j, _, _) = (interpolant.shares(s, sympy) for s in (k, j))
    noise_v = a_k / (a_k * rate_b - rate_a * b_k)
    noise_x = -rate_a / (a_k * rate_b - rate_a * b_k)
    printed = (
        a_j * (1 - b_k * noise_x) / a_k + b_j * noise_x,
        -a_j * b_k * noise_v / a_k + b_j * noise_v,
    )
    for mine, theirs in zip(Interpolant.leap(interpolant, k, j, sympy), printed, strict=True):
        assert sympy.simplify(sympy.sympify(mine - theirs)) == 0


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_ends_and_rates(interpolant):
    assert [float(f(0)) for f in (interpolant.alpha, interpolant.beta)] == pytest.approx([1, 0], abs=1e-15)
    assert [float(f(1)) for f in (interpolant.alpha, interpolant.beta)] == pytest.approx([0, 1], abs=1e-15)
    alpha, beta, alpha_rate, beta_rate = interpolant.shares(t, sympy)
    for value, rate in ((alpha, alpha_rate), (beta, beta_rate)):
        assert sympy.simplify(sympy.diff(value, t) - rate) == 0


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
@given(TIMES)
def test_a_leap_to_its_start_is_the_identity(interpolant, a):
    assert interpolant.leap(a, a) == pytest.approx((1, 0), abs=1e-14)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
@given(TIMES, TIMES, st.integers(0, 2**16))
def test_a_point_mass_is_reached_exactly(interpolant, a, b, seed):
    """With one image the velocity is alpha' x_0 + beta' x_1 of that pair: the leap is exact, k = T included."""
    image, noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = interpolant.alpha(a) * image + interpolant.beta(a) * noise
    *_, image_rate, noise_rate = interpolant.shares(a)
    v = image_rate * image + noise_rate * noise
    big_a, big_b = interpolant.leap(a, b)
    torch.testing.assert_close(big_a * x + big_b * v, interpolant.alpha(b) * image + interpolant.beta(b) * noise)
    if a > 0.01:
        field = Gaussian(image, torch.zeros(4, dtype=torch.float64), interpolant)
        torch.testing.assert_close(field(x, torch.tensor(a, dtype=torch.float64)).detach(), v)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
@given(TIMES, TIMES, st.integers(0, 2**16))
def test_a_leap_on_gaussian_data_mixes_the_two_expectations(interpolant, a, b, seed):
    """x^_j|k = alpha_j E[x_0 | x_k] + beta_j E[x_1 | x_k], with both expectations by Bayes' rule."""
    mean, spread, x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread = 0.3 + spread.abs()
    share, noise = interpolant.alpha(a), interpolant.beta(a)
    variance = share**2 * spread**2 + noise**2
    image = mean + share * spread**2 / variance * (x - share * mean)
    start = noise / variance * (x - share * mean)
    sigma = torch.tensor(a, dtype=torch.float64)
    v = Gaussian(mean, spread, interpolant)(x, sigma).detach()
    big_a, big_b = interpolant.leap(a, b)
    torch.testing.assert_close(big_a * x + big_b * v, interpolant.alpha(b) * image + interpolant.beta(b) * start)


def test_the_velocity_of_gaussian_data_transports_its_distribution():
    """Small Euler steps along v carry N(alpha m, alpha^2 s^2 + beta^2) from noise to N(m, s^2)."""
    for interpolant in INTERPOLANTS:
        field = Gaussian(torch.tensor([0.7]), torch.tensor([0.4]), interpolant)
        x = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
        times = torch.linspace(1, 0, 2001)
        with torch.no_grad():
            for now, after in pairwise(times):
                x = x + (after - now) * field(x, now)
        torch.testing.assert_close(x, 0.7 + 0.4 * torch.linspace(-2, 2, 5)[:, None], rtol=0, atol=5e-3)
