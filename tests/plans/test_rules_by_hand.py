"""Each rule at its boundary: a plan that it just allows and one that it just refuses, with the message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import combinations_with_replacement, product
from string import ascii_letters
from typing import Any

import pytest

from trajsurgery import Plan, PlanError, latent, leapalign, noise, recorded
from trajsurgery.plans.legality import PLAN_RULES, check_sampled, violations
from trajsurgery.plans.nodes import Advance, LatentNode, Leap, Noise, Scale, Velocity
from trajsurgery.plans.rules import RULES

STEPS = 4
X: Any = latent(3)
V: Any = X.velocity()


def at(t: int) -> Any:
    return latent(t).velocity()


LEGAL: tuple[Callable[[], Plan], ...] = (
    lambda: Plan(latent(6).leap(0), steps=6),
    lambda: Plan(latent(1).leap(0), steps=1),
    lambda: Plan(latent("T").leap(5), steps=6),
    lambda: Plan(latent("a").leap("b")),
    lambda: Plan(latent("T").leap(5)),
    lambda: Plan(X.leap(2)),
    lambda: Plan(X.leap(0, velocity=V.scale(0.5))),
    lambda: Plan(X.discount(0).leap(0)),
    lambda: Plan(X.discount(1).leap(0)),
    lambda: Plan(X.discount("a").leap(0)),
    lambda: Plan(X.leap(0, velocity=V.scale("a"))),
    lambda: Plan(X.leap(0, velocity=V.scale(1e9))),
    lambda: Plan(X.leap(0, velocity=X.velocity("name"))),
    lambda: Plan(latent(0).renoise(1).leap(0)),
    lambda: Plan(latent(0).renoise("T").leap(0), steps=4),
    lambda: Plan(latent("t").renoise(3).leap(0)),
    lambda: Plan(latent(0).renoise(3, 7).leap(1).recover(7)),
    lambda: Plan(latent(0).renoise(3, "rollout").leap(1).recover("rollout")),
    lambda: Plan(latent(0).renoise(3, 1).leap(0).renoise(2, 2).leap(1).recover(2)),
    lambda: Plan(latent(0).renoise(3, 1).leap(0).renoise(3, 1).leap(1).recover(1)),
    lambda: Plan(latent(0).renoise(3, "rollout").leap(0).renoise(2, "rollout").leap(1).recover("rollout")),
    lambda: Plan(noise().leap(0), steps=4),
    lambda: Plan(Noise(4).leap(0), steps=4),
    lambda: Plan(X.advance(0, [V])),
    lambda: Plan(X.advance(0, [at(5), at(1)])),
    lambda: Plan(X.advance(0, [V, at(5), at(4)], "adams-bashforth")),
    lambda: Plan(X.advance(1, [V, at(2)], "euler")),
    lambda: Plan(latent("k").advance(0, [latent("k").velocity(), at(1)], "euler")),
    lambda: Plan(X.advance("j", [V, at(1)], "euler")),
    lambda: Plan(latent("T").advance(0, [latent("T").velocity(), at(6)], "adams-bashforth")),
    lambda: Plan(X.leap(2, velocity=recorded(3)).leap(0)),
)


@pytest.mark.parametrize("make", LEGAL)
def test_plans_at_the_boundary_are_legal(make: Callable[[], Plan]) -> None:
    assert violations(make().outputs, make().steps) == []


ILLEGAL: tuple[tuple[Callable[[], Any], str, str], ...] = (
    (lambda: Plan(Leap(X, X, 0)), "kinds", "leap of a latent, at"),
    (lambda: Plan(Leap(V, V, 0)), "kinds", "leap of a velocity, at"),
    (lambda: Plan(Advance(X, (V, latent(4)), 0)), "kinds", "advance of a latent, at"),
    (lambda: Plan(X.leap(0, velocity=Velocity(V))), "kinds", "velocity of a velocity, at"),
    (lambda: Plan(X.leap(0, velocity=Scale(X, 0.5))), "kinds", "scale of a latent, at"),
    (lambda: Plan(latent(2.5).leap(0)), "time-type", "the time 2.5, in"),
    (lambda: Plan(latent(True).leap(0)), "time-type", "the time True, in"),
    (lambda: Plan(latent("a b").leap(0)), "time-type", "the time 'a b', in"),
    (lambda: Plan(X.leap(None)), "time-type", "the time None, in"),
    (lambda: Plan(latent(7).leap(0), steps=6), "time-range", "the time 7, of 6 steps, in"),
    (lambda: Plan(X.leap(-1)), "time-range", "the time -1, of T steps, in"),
    (lambda: Plan(X.advance(0, [V, at(0)])), "model-time", "velocity at t = 0, in"),
    (lambda: Plan(X.advance(0, [V, recorded(0)])), "model-time", "recorded at t = 0, in"),
    (lambda: Plan(X.leap(3)), "falling", "a leap from t = 3 to t = 3, in"),
    (lambda: Plan(latent("T").leap(6), steps=6), "falling", "a leap from t = 6 to t = 6, in"),
    (lambda: Plan(latent("k").leap("k")), "falling", "a leap from t = k to itself, in"),
    (lambda: Plan(X.leap(4)), "falling", "a leap from t = 3 to t = 4, in"),
    (lambda: Plan(X.advance(3, [V])), "falling", "a advance from t = 3 to t = 3"),
    (lambda: Plan(X.leap(0, velocity=at(2))), "velocity-time", "a latent at t = 3 with a velocity at t = 2, in"),
    (lambda: Plan(X.leap(0, velocity=at(4))), "velocity-time", "a latent at t = 3 with a velocity at t = 4, in"),
    (lambda: Plan(X.discount("T").leap(0)), "factor-type", "the factor 'T', in"),
    (lambda: Plan(X.discount("a b").leap(0)), "factor-type", "the factor 'a b', in"),
    (lambda: Plan(X.discount(None).leap(0)), "factor-type", "the factor None, in"),
    (lambda: Plan(X.leap(0, velocity=V.scale(True))), "factor-type", "the factor True, in"),
    (lambda: Plan(X.discount(float("inf")).leap(0)), "finite", "the factor inf, in"),
    (lambda: Plan(X.leap(0, velocity=V.scale(float("nan")))), "finite", "the factor nan, in"),
    (lambda: Plan(X.discount(1.0001).leap(0)), "discount-range", "discount(1.0001), in"),
    (lambda: Plan(X.discount(-0.0001).leap(0)), "discount-range", "discount(-0.0001), in"),
    (lambda: Plan(X.discount(2).leap(0)), "discount-range", "discount(2.0), in"),
    (lambda: Plan(X.leap(0, velocity=V.scale(-0.0001))), "scale-range", "scale(-0.0001), in"),
    (lambda: Plan(X.leap(0, velocity=X.velocity(3))), "field-name", "the field 3, in"),
    (lambda: Plan(latent(1).renoise(3).leap(0)), "renoise-start", "renoise from t = 1, in"),
    (lambda: Plan(latent("T").renoise(3).leap(0), steps=4), "renoise-start", "renoise from t = 4, in"),
    (lambda: Plan(X.leap(0).renoise(0)), "renoise-to", "renoise to t = 0, in"),
    (lambda: Plan(X.leap(0).recover()), "recover-start", "recover from t = 0, in"),
    (lambda: Plan(latent(0).renoise(3, -1).leap(0)), "draw", "draw=-1, in"),
    (lambda: Plan(latent(0).renoise(3, True).leap(0)), "draw", "draw=True, in"),
    (lambda: Plan(latent(0).renoise(3, "other").leap(0)), "draw", "draw='other', in"),
    (lambda: Plan(X.leap(1).recover(1.5)), "draw", "draw=1.5, in"),
    (
        lambda: Plan(latent(0).renoise(3, 1).leap(0).renoise(2, 1).leap(1).recover(1)),
        "recover-draw",
        "recover(draw=1) below samples renoised to t = ['2', '3'], in",
    ),
    (lambda: Plan(Noise(3).leap(0), steps=4), "noise-time", "noise at t = 3 of T = 4, in"),
    (lambda: Plan(X.advance(0, [V], "simpson")), "quadrature", "rule='simpson', in"),
    (lambda: Plan(X.advance(0, [])), "supports", "no velocity, in"),
    (lambda: Plan(X.advance(0, [V, recorded(3)])), "supports", "velocities at t = [3, 3]: one time twice, in"),
    (
        lambda: Plan(latent("T").advance(0, [latent("T").velocity(), at(4)], "lagrange"), steps=4),
        "supports",
        "velocities at t = [4, 4]: one time twice, in",
    ),
    (
        lambda: Plan(X.advance(0, [at(4)], "adams-bashforth")),
        "supports",
        "velocities at t = [4], none at the latent's t = 3, in",
    ),
    (
        lambda: Plan(X.advance(0, [V, at(2)], "adams-bashforth")),
        "supports",
        "velocities at t = [3, 2], some below the latent's t = 3, in",
    ),
    (
        lambda: Plan(X.advance(0, [at(2)], "euler")),
        "supports",
        "velocities at t = [2], none at the latent's t = 3, in",
    ),
    (lambda: Plan(X.advance(1, [V, at(4)], "euler")), "supports", "velocities at t = [3, 4], some outside 3..2, in"),
    (lambda: Plan(X.advance(1, [V, at(1)], "euler")), "supports", "velocities at t = [3, 1], some outside 3..2, in"),
    (lambda: Plan(), "outputs", "Received []."),
    (lambda: Plan(V), "outputs", "Received ['velocity']."),
    (lambda: Plan(X.leap(0), None), "outputs", "Received ['leap', None]."),
    (lambda: Plan(X), "trains", "Received x_3."),
    (lambda: Plan(X.leap(0), X), "trains", "Received x_3."),
    (lambda: Plan(X.leap(0), steps=0), "steps-type", "Received steps=0."),
    (lambda: Plan(X.leap(0), steps=True), "steps-type", "Received steps=True."),
    (lambda: Plan(X.leap(0), steps=2.0), "steps-type", "Received steps=2.0."),
    (lambda: Plan(X.leap(0), steps=4).prepared(5), "steps", "Received a plan for 4 steps, a trajectory of 5."),
    (lambda: Plan(X.leap(0), steps=4).prepared(3), "steps", "Received a plan for 4 steps, a trajectory of 3."),
    (lambda: Plan(latent(-1).leap(0)), "time-range", "the time -1, of T steps, in"),
    (lambda: leapalign("k", "j").prepared(5), "unbound", "Received k, j in x_k -> "),
    (lambda: X.leap(0, discount=0.5, velocity=V), "one-velocity", "both discount=0.5 and velocity="),
)


@pytest.mark.parametrize("make, rule, received", ILLEGAL)
def test_plans_past_the_boundary_are_refused(make: Callable[[], Any], rule: str, received: str) -> None:
    with pytest.raises(PlanError) as err:
        make()
    assert err.value.rules == (rule,)
    assert received in str(err.value)
    if rule in RULES:
        assert str(err.value).startswith(f"[{rule}] {RULES[rule].demand}. Received ")
        assert str(err.value).endswith(RULES[rule].repair)
    elif rule in PLAN_RULES and rule != "one-velocity":
        demand, repair = PLAN_RULES[rule]
        assert str(err.value).startswith(f"[{rule}] {demand}. Received ")
        assert str(err.value).endswith(f". {repair}")


@pytest.mark.parametrize(
    "sigmas, legal",
    [
        ([1.0, 0.5, 0.25, 0.0], True),
        ([0.0, 0.5, 0.75, 1.0], True),
        ([1.0, 0.5, 0.5, 0.0], False),
        ([0.0, 0.5, 0.5, 1.0], False),
        ([1.0, 0.25, 0.5, 0.0], False),
        ([1.001, 0.5, 0.25, 0.0], False),
        ([1.0, 0.5, 0.25, -0.001], False),
        ([1.0], False),
        ([], False),
        ([1.0, float("nan"), 0.5, 0.0], False),
    ],
)
def test_sigmas_are_strictly_monotonic_in_0_to_1(sigmas: list[float], legal: bool) -> None:
    if legal:
        check_sampled(sigmas)
        return
    with pytest.raises(PlanError, match=r"the sigmas received, \["):
        check_sampled(sigmas)


def test_every_rule_is_broken_once() -> None:
    assert {rule for _, rule, _ in ILLEGAL} == {*RULES, *PLAN_RULES}


def test_several_broken_rules_are_all_reported() -> None:
    with pytest.raises(PlanError) as err:
        Plan(latent(9).leap(9).discount(2), latent(8).leap(8), steps=6)
    assert err.value.rules == ("time-range", "falling", "discount-range")
    assert str(err.value).count("\n") == 6
    # a node of the wrong kind is reported alone: the other rules can't be checked on it
    with pytest.raises(PlanError) as err:
        Plan(Leap(X, X, 0).leap(1).leap(9), steps=6)
    assert err.value.rules == ("kinds",)


def names(node: LatentNode) -> set[str]:
    """The rules that a plan of this one output breaks."""
    return {violation.rule for violation in violations((node,), STEPS)}


def test_a_leap_falls_but_for_the_inversion_from_a_renoised_image() -> None:
    """All pairs of times: an advance never rises, a leap only from a renoised sample, and neither stands still."""
    for start, to in product(range(1, STEPS + 1), range(1, STEPS + 1)):
        for x in (latent(start), latent(0).renoise(start), latent(0).renoise(start).discount(0.5), noise()):
            t, renoised = STEPS if x.t == "T" else start, x.op == "renoise"
            falls = to < t
            assert ("falling" in names(x.leap(to))) == (not falls and not (renoised and to > t))
            assert ("falling" in names(x.advance(to, [x.velocity()], "lagrange"))) == (not falls)


def test_an_advance_s_velocities_suit_its_rule() -> None:
    """All sets of one to three times, with every start and landing, against the rule's words."""
    for start, to in ((s, to) for s in range(1, STEPS + 1) for to in range(s)):
        for count in (1, 2, 3):
            for times in combinations_with_replacement(range(STEPS, 0, -1), count):
                suits = {
                    "lagrange": True,
                    "adams-bashforth": start in times and all(t >= start for t in times),
                    "euler": start in times and all(to < t <= start for t in times),
                }
                for rule, legal in suits.items():
                    distinct = len(set(times)) == count
                    advance = latent(start).advance(
                        to, [latent(t).velocity().scale(1 + i) for i, t in enumerate(times)], rule
                    )
                    assert ("supports" not in names(advance)) == (legal and distinct), (start, to, times, rule)


def test_every_name_but_that_of_the_first_time_may_stand_for_a_factor() -> None:
    for name in (*ascii_letters, "S9", "TT", "T_"):
        assert ("factor-type" in names(X.discount(name).leap(0))) == (name == "T")
        assert ("factor-type" in names(X.leap(0, velocity=V.scale(name)))) == (name == "T")


def test_names_wait_for_their_numbers_in_every_rule_of_an_advance() -> None:
    """What a name stands for is checked when it is bound; numbers beside an unbound start wait with it."""
    x: Any = latent(3)
    for rule in ("adams-bashforth", "euler"):
        plan = Plan(x.advance(0, [latent("s").velocity()], rule=rule))
        with pytest.raises(PlanError):
            plan.at(s=1) if rule == "adams-bashforth" else plan.at(s=4)
        assert plan.at(s=3).nodes
        Plan(latent("k").advance(0, [at(3)], rule=rule))
    above = latent(2).advance(0, [at(3)], rule="adams-bashforth")
    assert [text for _, text in _broken(above)] == ["velocities at t = [3], none at the latent's t = 2"]


def _broken(node: Any) -> list[tuple[Any, str]]:
    """The rules that a node breaks, each with what was received."""
    return [(rule, text) for rule in RULES.values() if isinstance(node, rule.on) for text in rule.broken(node, STEPS)]


def test_one_mistake_breaks_one_rule_once() -> None:
    assert [rule.id for rule, _ in _broken(Scale(V, float("-inf")))] == ["finite"]
    assert [rule.id for rule, _ in _broken(Scale(V, float("inf")))] == ["finite"]
    assert [rule.id for rule, _ in _broken(Noise(STEPS + 5))][:1] != []
    assert "noise at t = 9 of T = 4" in [text for _, text in _broken(Noise(STEPS + 5))]
    assert "noise at t = 2 of T = 4" in [text for _, text in _broken(Noise(2))]


def test_rules_can_t_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        RULES["kinds"].id = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_equal_times_and_words_are_equal_whatever_objects_they_are() -> None:
    """Python keeps one object of each small int and of each word of the source, but not of those that are read."""
    many, name, rollout_draw = int("300"), "".join(["na", "me"]), "".join(["roll", "out"])
    for start, to in ((300, many), (name, "".join(["na", "me"]))):
        with pytest.raises(PlanError) as error:
            Plan(latent(start).leap(to))  # pyright: ignore[reportArgumentType]
        assert error.value.rules == ("falling",)
    assert Plan(latent(0).renoise(1, rollout_draw).leap(0)).nodes  # pyright: ignore[reportArgumentType]
