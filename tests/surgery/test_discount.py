"""alpha = 0 is detach and alpha = 1 is no discount, in every plan and in every way of running it."""

import pytest
import torch
from hypothesis import example, given, reject
from hypothesis import strategies as st

from tests.builders.problems import WAYS, cotangents, distance, grads, outputs, problem
from tests.tolerances import GRADIENT
from trajsurgery import Plan, PlanError, apply, latent, leapalign
from trajsurgery.testing import MLP, plans, trajectories

STEPS, DIM = 5, 4
FIELD = MLP(DIM, seed=11)
ROLLED = problem(FIELD, STEPS)


def rewritten(plan: Plan, ops: dict[str, str | None], a: float) -> tuple[Plan, Plan]:
    """The plan with every factor set to a, and the plan with the nodes in `ops` replaced by a detach or, for None,
    removed.
    """
    first, second = {}, {}
    for node in plan.nodes:
        first[node] = node.replace(first, lambda field, value: a if field == "a" else value)
        if node.op in ops:
            parent = second[node.parents[0]]
            second[node] = parent.detach() if ops[node.op] == "detach" else parent
        else:
            second[node] = node.replace(second, lambda _, value: value)
    return Plan(*(first[o] for o in plan.outputs)), Plan(*(second[o] for o in plan.outputs))


def gradients(plan, trajectory):
    out = outputs(apply(plan, trajectory, FIELD))
    return [*out, *grads(out, [*FIELD.parameters(), trajectory.start], cotangents(out))]


FACTORED = plans(STEPS).filter(lambda plan: any(node.op in ("discount", "scale") for node in plan.nodes))


@given(FACTORED, trajectories(FIELD, STEPS, (DIM,)), st.sampled_from((0.0, 1.0)))
@example(leapalign(4, 2, 0.3), ROLLED.trajectory, 0.0)
@example(leapalign(4, 2, 0.3), ROLLED.trajectory, 1.0)
def test_discount_0_is_detach_and_1_is_no_discount(plan, trajectory, a):
    try:
        discounted, plain = rewritten(plan, dict.fromkeys(("discount", "scale"), "detach" if a == 0 else None), a)
    except PlanError as err:
        assert err.rules == ("trains",)  # noqa: PT017  with every discount at 0, some plans train nothing
        reject()
    count = len(plan.outputs)
    actual, expected = gradients(discounted, trajectory), gradients(plain, trajectory)
    assert all(torch.equal(x, y) for x, y in zip(actual[:count], expected[:count], strict=True))
    # With discounts, calls that differ only in their factor are two, without them one: sums are added in another order.
    assert distance(actual[count:], expected[count:]) <= GRADIENT


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("a", [0.0, 1.0])
def test_discount_0_is_detach_and_1_is_no_discount_in_every_way_of_running(way, a):
    x = latent(4).leap(2).connect()
    plain = Plan(x.leap(0, velocity=(x.detach() if a == 0 else x).velocity()).connect())
    by_plan = [WAYS[way](plan, ROLLED, ROLLED.params, FIELD)[1] for plan in (leapalign(4, 2, a), plain)]
    assert all(torch.equal(x, y) for x, y in zip(*by_plan, strict=True))


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_gradient_is_affine_in_alpha(a, b):
    half = gradients(leapalign(4, 2, (a + b) / 2), ROLLED.trajectory)
    ends = zip(gradients(leapalign(4, 2, a), ROLLED.trajectory), gradients(leapalign(4, 2, b), ROLLED.trajectory))
    for middle, (x, y) in zip(half, ends, strict=True):
        torch.testing.assert_close(middle, (x + y) / 2)
