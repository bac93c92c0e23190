"""Border cases of the core that Hypothesis seldom draws; each kills a mutant (benchmarks/engine/mutants.py)."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import permutations
from typing import Any

import pytest
import sympy
import torch

from trajsurgery import (
    PerSample,
    Plan,
    PlanError,
    SamplerError,
    apply,
    distances,
    latent,
    leapalign,
    noise,
    recorded,
    rollout,
    sample,
)
from trajsurgery.plans.closed_form import _multiply
from trajsurgery.plans.interpolants import InvertedFlow, Polynomial, RectifiedFlow, Trigonometric
from trajsurgery.plans.legality import Violation, check_sampled, violations
from trajsurgery.plans.nodes import Leap
from trajsurgery.surgery import autograd_functions
from trajsurgery.surgery.execution import first_call
from trajsurgery.testing import MLP

S = sympy.Symbol("s")
K, J = sympy.symbols("k j")
FIELD = MLP(3)


def test_coefficients_of_the_inverted_flow() -> None:
    flow = InvertedFlow()
    assert (flow.alpha(0.25), flow.beta(0.25)) == (0.25, 0.75)
    assert flow.shares(0.25) == (0.25, 0.75, 1, -1)
    assert type(flow.shares(0.25)[3]) is int
    assert flow.leap(0.25, 0.75) == (1, 0.5)


@pytest.mark.parametrize(
    "a, b, product", [(1, S, S), (S, 1, S), (-1, S, -S), (0, S, 0), (S, 2, 2 * S), (S, -1, -S), (2, 3, 6)]
)
def test_products_of_numbers_and_symbols(a: Any, b: Any, product: Any) -> None:
    assert _multiply(a, b) == product


def test_a_number_times_a_difference_stays_a_product() -> None:
    for product in (_multiply(sympy.Float(0.5), K - J), _multiply(K - J, sympy.Float(0.5))):
        assert str(product) == "0.5*(-j + k)"


@pytest.mark.parametrize("sigmas", [None, 3, [None], ["a", "b"], [torch.zeros(2), 0.0], torch.ones(3, device="meta")])
def test_sigmas_that_are_no_list_of_numbers_are_refused(sigmas: Any) -> None:
    with pytest.raises(PlanError, match="sigmas"):
        check_sampled(sigmas)


def test_a_violation_is_a_value() -> None:
    broken = Violation("rule", "message")
    assert len({broken, Violation("rule", "message")}) == 1
    with pytest.raises(FrozenInstanceError):
        broken.rule = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_leap_from_the_image_breaks_the_rule_of_falling_times() -> None:
    stays = latent(0).leap(0, velocity=recorded(0))
    assert "falling" in {violation.rule for violation in violations([stays])}


def test_times_are_compared_by_value() -> None:
    """CPython shares integers up to 256 only: equal larger ones may be different objects."""
    steps = int("300")
    plan = Plan(noise().leap(int("150")).connect().leap(0)).prepared(steps)
    assert not list(violations(plan.outputs, int("300")))
    call = first_call(leapalign(int("300"), 2).prepared(steps), int("300"))
    assert call is not None
    assert call.t == steps
    assert Plan(latent(7).leap(0), steps=int("300")).prepared(int("300")).steps == steps


def test_recompute_under_forward_mode_is_retain() -> None:
    trajectory = rollout(FIELD, torch.ones(2, 3, dtype=torch.float64), [1.0, 0.5, 0.0])
    params = dict(FIELD.named_parameters())
    tangents = {name: torch.ones_like(p) for name, p in params.items()}
    derivatives: list[torch.Tensor] = []
    for memory in ("retain", "recompute"):
        with torch.autograd.forward_ad.dual_level():
            dual = {name: torch.autograd.forward_ad.make_dual(p.detach(), tangents[name]) for name, p in params.items()}
            out = apply(
                leapalign(2, 1, 0.3),
                trajectory,
                lambda x, sigma, dual=dual: torch.func.functional_call(FIELD, dual, (x, sigma)),
                memory,
                params=list(FIELD.parameters()),
            )
            derivatives.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    assert torch.equal(*derivatives)
    assert derivatives[0].abs().max() > 0


def test_a_gate_passes_gradient_in_its_rows_only() -> None:
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    for rows, passed in ((None, [1, 1, 1]), (torch.tensor([True, False, True]), [1, 0, 1])):
        gate = autograd_functions.Gate()
        out = autograd_functions.gated(x, gate)
        assert torch.equal(out, x)
        assert out is not x
        gate.rows = rows
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(gradient, torch.tensor(passed, dtype=x.dtype)[:, None].expand(3, 2))


class Detaching(torch.nn.Module):
    """A field whose first velocity is detached from its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (self.w * x).detach() if float(sigma) == 1.0 else self.w * x


def test_a_velocity_without_gradient_is_named() -> None:
    trajectory = rollout(Detaching(), torch.ones(2, 3), [1.0, 0.5, 0.0])
    with pytest.raises(SamplerError, match="the velocity at t = 2 carries no gradient"):
        apply(leapalign(2, 1, 0.3), trajectory, Detaching())


def test_a_call_on_two_paths_is_one_term() -> None:
    v = latent(1).velocity()
    plan = Plan(latent(3).advance(1, [latent(3).velocity(), v]).leap(0, velocity=v))
    expansion = plan.gradient()
    assert (expansion.count, len(expansion.terms)) == (2, 2)


@pytest.mark.parametrize("kind", [RectifiedFlow, InvertedFlow, Trigonometric, Polynomial])
def test_interpolants_are_values(kind: type) -> None:
    assert kind() == kind()
    assert len({kind(), kind(), RectifiedFlow()}) == (1 if kind is RectifiedFlow else 2)


def test_a_factor_of_one_leaves_a_difference_as_it_is() -> None:
    assert _multiply(K - J, 1) == K - J


def test_supports_of_an_euler_advance_lie_above_its_end() -> None:
    x = latent(3)
    with pytest.raises(PlanError, match="euler"):
        Plan(x.advance(2, [x.velocity(), latent(1).velocity()], rule="euler"))


def test_quadrature_rules_are_compared_by_value() -> None:
    """A string made at run time is a different object from the library's."""
    start = latent("p")
    velocities = [start.velocity(), *(latent(t).velocity() for t in ("q", "r", "u"))]
    expansion = Plan(start.advance("z", velocities, rule="".join(("eu", "ler")))).gradient()
    p, q, z, u = sympy.symbols("p q z u")
    coefficients = {term.source: term.coefficient for term in expansion.terms}
    assert sympy.simplify(coefficients["p"] - (q - p)) == 0
    assert sympy.simplify(coefficients["u"] - (z - u)) == 0


def test_calls_of_a_long_rollout_are_reused() -> None:
    calls: list[float] = []

    def field(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(float(sigma))
        return FIELD(x, sigma)

    times = torch.linspace(1, 0, 301, dtype=torch.float64)
    noise_ = torch.ones(1, 3, dtype=torch.float64)
    sample(leapalign(int("300"), int("280"), 0.3), field, noise_, times, params=list(FIELD.parameters()))
    assert len(calls) == 300


def test_violations_before_a_wrong_kind_are_reported() -> None:
    illegal = Leap(latent(7).discount(5.0), latent(7), 0)
    assert [violation.rule for violation in violations([illegal, illegal.leap(9)])] == ["discount-range", "kinds"]


def test_a_time_below_0_is_no_image() -> None:
    assert {violation.rule for violation in violations([latent(-1).recover()])} == {"time-range"}


def test_the_time_of_a_velocity_is_compared_by_value() -> None:
    x = latent(int("300")).leap(0, velocity=recorded(int("300")))
    assert "velocity-time" not in {violation.rule for violation in violations([x])}


def test_noises_are_drawn_after_the_rollout() -> None:
    """A field, or a sampler, may draw from the same generator."""
    generator, again = (torch.Generator().manual_seed(0) for _ in range(2))

    def field(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        torch.rand(1, generator=generator)
        return FIELD(x, sigma)

    plan, start = Plan(latent(3).leap(2).recover()), torch.ones(1, 3, dtype=torch.float64)
    _, trajectory = sample(plan, field, start, [1, 0.7, 0.4, 0], generator=generator, params=list(FIELD.parameters()))
    for _ in range(3):
        torch.rand(1, generator=again)
    assert torch.equal(trajectory.noise(0, 2), torch.randn(1, 3, dtype=torch.float64, generator=again))


def test_a_sample_whose_plan_lands_elsewhere_has_no_distance_there() -> None:
    """For all pairs of times of three steps: [batch] distances, NaN where a sample's own plan does not land."""
    trajectory = rollout(FIELD, torch.ones(2, 3, dtype=torch.float64), [1, 0.7, 0.4, 0])
    for first, second in permutations(((3, 2), (3, 1), (2, 1)), 2):
        by_time = distances(PerSample([leapalign(*first), leapalign(*second)]), trajectory, FIELD)
        assert {t: (~d.isnan()).tolist() for t, d in by_time.items()} == {
            t: [t in (first[1], 0), t in (second[1], 0)] for t in {first[1], second[1], 0}
        }


@pytest.mark.parametrize("pair", [(3, 2), (3, 1), (2, 1)])
def test_split_adds_the_gradient_of_retain(pair: tuple[int, int]) -> None:
    """With the calls of the rollout, and with calls that are made in the backward pass."""
    start, times, plan = torch.ones(2, 3, dtype=torch.float64), [1, 0.7, 0.4, 0], leapalign(*pair)
    trajectory, params = rollout(FIELD, start, times), list(FIELD.parameters())
    out: Any = apply(plan, trajectory, FIELD)
    expected = torch.autograd.grad(out.sin().sum(), params)
    for split in (
        lambda: sample(plan, FIELD, start, times, memory="split")[0],
        lambda: apply(plan, trajectory, FIELD, "split"),
    ):
        FIELD.zero_grad()
        out = split()
        assert torch.equal(out, trajectory[0])
        out.sin().sum().backward()
        for p, g in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-13, atol=1e-13)
    FIELD.zero_grad()
