"""The public strategies: they reach every primitive, draw legal plans, and shrink to minimal ones."""

from itertools import pairwise

import pytest
from hypothesis import Phase, event, find, given, settings
from hypothesis import strategies as st

from tests.builders.problems import problem
from trajsurgery import Plan, latent
from trajsurgery.plans.graph import trained
from trajsurgery.plans.nodes import PRIMITIVES
from trajsurgery.surgery import autograd_functions
from trajsurgery.testing import INTERPOLANTS, MLP, MOVES, check_gradient, fields, methods, plans, sigmas, trajectories

STEPS = 5
SEARCH = settings(max_examples=3000, derandomize=True, database=None, deadline=None,
                  phases=(Phase.generate, Phase.shrink))  # fmt: skip
CHECKS = {"values", "retain", "recompute", "staged", "checkpointed", "jvp", "differences"}


def test_every_primitive_has_a_move():
    assert set(MOVES) == set(PRIMITIVES)


@pytest.mark.parametrize("op", PRIMITIVES)
def test_every_primitive_is_reached_and_shrinks(op):
    """The smallest plan with the primitive has few nodes."""
    plan = find(plans(STEPS, calls=1), lambda plan: any(node.op == op for node in plan.nodes), settings=SEARCH)
    assert len(plan.nodes) <= 9
    assert len(plan.outputs) == 1


def test_plans_shrink_to_one_leap():
    plan = find(plans(STEPS), lambda _: True, settings=SEARCH)
    assert plan == Plan(latent(1).leap(0))


def test_a_planted_bug_in_the_connector_shrinks_to_one_leap_and_one_connector(monkeypatch):
    connect, p = autograd_functions.connect, problem(MLP(4, seed=11), STEPS)
    monkeypatch.setattr(autograd_functions, "connect", lambda x, real: connect(0.5 * x, real))

    def fails(plan):
        try:
            check_gradient(plan, p.trajectory, p.field, skip=CHECKS - {"retain"})
        except AssertionError:
            return any(node.op == "connect" for node in plan.nodes)  # a sampler's step is connected without the node
        return False

    plan = find(plans(STEPS), fails, settings=SEARCH)
    assert plan == Plan(latent(1).leap(0).connect())


@settings(max_examples=400, derandomize=True, database=None, phases=(Phase.generate,), report_multiple_bugs=False)
@given(st.data())
def draw_and_count(seen, data):
    plan = data.draw(plans(STEPS))
    count = sum(node.op == "velocity" for node in trained(plan.outputs))
    event(f"{count} calls")
    seen["calls"].add(count)
    seen["ops"].update(node.op for node in plan.nodes)


def test_plans_reach_every_primitive_and_up_to_twelve_calls():
    seen = {"calls": set(), "ops": set()}
    draw_and_count(seen)
    assert seen["ops"] == set(PRIMITIVES)
    assert seen["calls"] >= {1, 2, 3, 12}
    assert len(seen["calls"] & set(range(4, 12))) >= 6


@given(trajectories(), methods())
def test_trajectories_and_methods_have_defaults(trajectory, method):
    assert trajectory[0].shape[1:] == (4,)
    assert method.draw(8).steps == 8


def test_deep_plans_are_drawn():
    plan = find(plans(STEPS), lambda plan: plan.gradient([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]).count >= 6, settings=SEARCH)
    assert len(plan.nodes) < 30


@given(plans(STEPS, outputs=3, fields=("guided",)))
def test_drawn_plans_run(plan):
    plan.prepared(STEPS)
    assert 1 <= len(plan.outputs) <= 3


@given(plans(STEPS, ops=("leap", "connect")))
def test_ops_narrow_what_is_drawn(plan):
    assert {node.op for node in plan.nodes} <= {"latent", "velocity", "leap", "connect", "discount"}


@given(st.integers(1, 12).flatmap(lambda steps: st.tuples(st.just(steps), methods(steps))))
def test_drawn_methods_draw_plans(drawn):
    steps, method = drawn
    assert method.draw(steps).steps == steps


@given(st.data(), st.integers(1, 12))
def test_drawn_sigmas_fall_and_trajectories_are_finite(data, steps):
    times = data.draw(sigmas(steps))
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, steps + 1)
    assert min(a - b for a, b in pairwise(times)) > 0.1 / steps
    trajectory = data.draw(trajectories(data.draw(fields(3)), steps, (3,), INTERPOLANTS))
    assert trajectory.steps == steps
    assert trajectory.start.requires_grad
    assert trajectory[0].isfinite().all()


def test_the_field_is_not_linear():
    """A leap from T to 0 misses by the size of the latents, so that rounding and nested terms are visible."""
    p = problem(MLP(4, seed=11))
    x = p.trajectory
    assert (x[8] - x.velocity(8) - x[0]).abs().mean() > 0.3 * x[0].abs().mean()
