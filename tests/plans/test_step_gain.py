"""`StepGain`: the factor that a run computes from its sampler's times."""

import json
import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.builders.problems import cotangents, distance, problem
from tests.tolerances import EXACT
from trajsurgery import Plan, PlanError, StepGain, apply, flowbp_lagrange, flowbp_sparse, latent, recorded
from trajsurgery.testing import MLP

STEPS = 8
P = problem(MLP(4, seed=3), STEPS)


def by(gain: object) -> Plan:
    """A leap whose velocity is scaled."""
    return Plan(latent(5).leap(2, velocity=latent(5).velocity().scale(gain)))  # pyright: ignore[reportArgumentType]


def gradient(plan: Plan) -> list[torch.Tensor]:
    out = apply(plan, P.trajectory, P.field)
    assert isinstance(out, torch.Tensor)
    return list(torch.autograd.grad(out, P.params, cotangents([out])))


@given(st.data())
def test_of_consecutive_times_it_is_the_path_s_length_over_that_of_the_active_steps(data: st.DataObject) -> None:
    high = data.draw(st.integers(1, STEPS))
    to = data.draw(st.integers(0, high - 1))
    times = range(high, to, -1)
    active = data.draw(st.sets(st.sampled_from(times), min_size=1))
    rescale = data.draw(st.sampled_from((0.0, 0.5, 1.0, 2.0)))
    sigma = P.trajectory.number
    share = sum(sigma(t) - sigma(t - 1) for t in active) / (sigma(high) - sigma(to))
    expected = [g * (1 + rescale * (1 / share - 1)) for g in gradient(by(1.0))]
    assert distance(gradient(by(StepGain(times, active, to, rescale=rescale))), expected) <= EXACT


def test_by_lagrange_the_weights_sizes_count() -> None:
    """Through 1, 3/4 and 1/2 the integral down to 0 has the weights 8, -16 and 20, over 12."""
    even = [0.0, 0.25, 0.5, 0.75, 1.0]
    gain = StepGain((4, 3, 2), (4, 3), 0, "lagrange")
    assert gain.value(even.__getitem__) == pytest.approx(44 / 24)
    assert StepGain((4, 3, 2), (2,), 0, "lagrange", 0.5).value(even.__getitem__) == pytest.approx(1 + (44 / 20 - 1) / 2)
    at_these = problem(MLP(4, seed=3), 4)
    scaled = Plan(latent(4).leap(0, velocity=latent(4).velocity().scale(gain)))
    plain = Plan(latent(4).leap(0))
    g = gain.value(at_these.trajectory.number)
    out, other = (apply(plan, at_these.trajectory, at_these.field) for plan in (scaled, plain))
    assert isinstance(out, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    one, expected = (torch.autograd.grad(o, at_these.params, cotangents([o])) for o in (out, other))
    assert distance(one, [g * x for x in expected]) <= EXACT


def test_a_plan_with_gains_is_data() -> None:
    plan = flowbp_sparse(4, {3, 1})
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert hash(plan) == hash(flowbp_sparse(4, [1, 3]))
    assert "g*v" in str(plan)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: StepGain((), ()),
        lambda: StepGain((3, 2), ()),
        lambda: StepGain((3, 2), (1,)),
        lambda: StepGain((2, 3), (3,)),
        lambda: StepGain((3, 3), (3,)),
        lambda: StepGain((3, 2), (3,), 2),
        lambda: StepGain((3, True), (3,)),
        lambda: StepGain((3, 2), (3,), 0, "adams-bashforth"),
        lambda: StepGain((3, 2), (3,), rescale=-1),
        lambda: StepGain((3, 2), (3,), rescale=math.inf),
        lambda: StepGain((3, 2), (3,), rescale=math.nan),
        lambda: Plan(latent(3).discount(StepGain((3, 2), (3,))).leap(0)),
        lambda: by(StepGain((9, 8), (9,))).prepared(STEPS),
        lambda: StepGain((4, 2), (4,), 0, "lagrange").value([0.0, 0.25, 0.5, 0.75, 1.0].__getitem__),
    ],
)
def test_what_is_no_gain_is_refused(wrong: object) -> None:
    with pytest.raises(PlanError):
        wrong()  # pyright: ignore[reportCallIssue]


def test_symbols_become_the_number() -> None:
    """Gains of quadratures stand for themselves in symbols; those of steps are written out."""
    sigmas = [sympy.Rational(t * t, STEPS * STEPS) for t in range(STEPS, -1, -1)]
    at = {sympy.Symbol(f"sigma_{STEPS - i}"): sigma for i, sigma in enumerate(sigmas)}
    for plan in (flowbp_lagrange(8, 4), flowbp_sparse(8, {7, 2}), by(StepGain((6, 3, 1), (3,), 0, "lagrange", 0.5))):
        symbols, numbers = plan.gradient(), plan.gradient([float(sigma) for sigma in sigmas])
        assert symbols.count == numbers.count
        for one, other in zip(symbols.terms, numbers.terms, strict=True):
            assert float(one.coefficient.subs(at)) == pytest.approx(float(other.coefficient), rel=1e-12)
    assert "g[sigma_8 -> sigma_4]" in str(flowbp_lagrange(8, 4).gradient())
    assert r"g^{\sigma_{8} \to \sigma_{4}}" in flowbp_lagrange(8, 4).gradient().latex()
    assert recorded(3).scale(StepGain((3,), (3,))).t == 3
