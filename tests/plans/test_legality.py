"""Legality: each rule has a mutation that breaks only it, and the error says what was received, where, and how to mend
it.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import illegal_plans
from tests.builders.examples import few_examples
from tests.builders.illegal_plans import STEPS, Mutant
from trajsurgery import Plan, PlanError, latent, leapalign, recorded, refl
from trajsurgery.plans.legality import PLAN_RULES, violations
from trajsurgery.plans.rules import RULES
from trajsurgery.testing import plans

FEWER = few_examples(50)


def test_every_rule_has_a_mutation():
    assert set(illegal_plans.RULES) == set(RULES)
    assert set(PLAN_MUTATIONS) == set(PLAN_RULES)


@FEWER
@given(plans(STEPS, fields=("guided",)))
def test_drawn_plans_are_legal(plan):
    assert violations(plan.outputs, plan.steps) == []
    plan.prepared(STEPS)


@pytest.mark.parametrize("rule", illegal_plans.RULES)
@FEWER
@given(plan=plans(STEPS), data=st.data())
def test_a_rule_is_broken_by_its_mutation_alone(rule, plan, data):
    numbers = [STEPS if node.t == "T" else node.t for node in plan.nodes]
    mutant = Mutant(data.draw, {**plan.to_dict(), "steps": STEPS}, numbers)
    received = illegal_plans.RULES[rule](mutant)
    with pytest.raises(PlanError) as err:
        Plan.from_dict(mutant.data)
    assert err.value.rules == (rule,)
    for line in str(err.value).splitlines():
        if line.startswith("["):
            assert line.startswith(f"[{rule}] {RULES[rule].demand}. Received ")
    assert received in str(err.value)
    assert RULES[rule].repair in str(err.value)
    assert re.search(r"Received .+, (in|at) \S", str(err.value))


def no_output(plan, draw):
    data = plan.to_dict()
    velocities = [i for i, node in enumerate(data["nodes"]) if node["op"] in ("velocity", "recorded")]
    data["outputs"] = draw(st.sampled_from([[], velocities[:1]]))
    Plan.from_dict(data)


def idle(plan, draw):
    outputs = list(plan.outputs)
    i = draw(st.integers(0, len(outputs) - 1))
    x = outputs[i]
    stopped = [x.detach(), x.discount(0), latent(3).leap(0, velocity=recorded(3)), latent(2)]
    outputs[i] = draw(st.sampled_from(stopped))
    Plan(*outputs)


def steps_type(plan, draw):
    Plan(*plan.outputs, steps=draw(st.sampled_from((0, -3, True, 2.5, "6", float("nan")))))


def other_steps(plan, draw):
    Plan(*plan.outputs, steps=STEPS).prepared(STEPS + draw(st.integers(1, 5)))


def unbound(plan, draw):
    name = draw(st.sampled_from(("k", "alpha", "t_2")))
    Plan(*plan.outputs, latent(name).leap(0)).prepared(STEPS)


def both(plan, draw):
    x = latent(draw(st.integers(1, STEPS)))
    x.leap(0, discount=draw(st.floats(0, 1)), velocity=x.velocity())


PLAN_MUTATIONS = {
    "outputs": no_output,
    "trains": idle,
    "steps-type": steps_type,
    "steps": other_steps,
    "unbound": unbound,
    "one-velocity": both,
}


@pytest.mark.parametrize("rule", PLAN_MUTATIONS)
@FEWER
@given(plan=plans(STEPS), data=st.data())
def test_a_rule_of_the_plan_is_broken_alone(rule, plan, data):
    with pytest.raises(PlanError) as err:
        PLAN_MUTATIONS[rule](plan, data.draw)
    assert err.value.rules == (rule,)
    if rule != "one-velocity":
        demand, repair = PLAN_RULES[rule]
        assert demand in str(err.value)
        assert repair in str(err.value)
        assert "Received" in str(err.value)


def test_both_a_discount_and_a_velocity_are_named():
    x = latent(4)
    with pytest.raises(PlanError, match=r"from x_4 received both discount=0\.5 and velocity=.*Drop it"):
        x.leap(0, discount=0.5, velocity=x.velocity())
    data = Plan(x.leap(0)).to_dict()
    data["nodes"][-1]["discount"] = 0.5
    with pytest.raises(PlanError) as err:
        Plan.from_dict(data)
    assert err.value.rules == ("one-velocity",)


def test_several_broken_rules_are_all_named():
    with pytest.raises(PlanError) as err:
        Plan(latent(3).leap(5).discount(2).leap(7, velocity=latent(3).velocity()))
    assert err.value.rules == ("falling", "discount-range", "velocity-time")


@pytest.mark.parametrize("k, j, rules", [(2, 5, ("falling",)), (3, 3, ("falling",)), (9, 3, ("time-range",))])
def test_names_are_checked_once_bound(k, j, rules):
    with pytest.raises(PlanError) as err:
        leapalign("k", "j").at(k=k, j=j).prepared(STEPS)
    assert err.value.rules == rules


def test_the_unbound_names_are_listed():
    with pytest.raises(PlanError, match=r"k, j.*plan\.at"):
        leapalign("k", "j").prepared(STEPS)
    with pytest.raises(PlanError, match=r"\bt\b"):
        refl("t").prepared(STEPS)
