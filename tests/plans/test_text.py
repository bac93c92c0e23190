"""A plan as text: the paper's arrows, the code that builds it, and `exact`."""

import pytest
from hypothesis import assume, given

import trajsurgery
from trajsurgery import Plan, draft_lv, drtune, latent, leapalign, leaps, noise, recorded, refl
from trajsurgery.testing import plans

STEPS = 6


@pytest.mark.parametrize(
    "plan, arrows",
    [
        (leapalign("k", "j", "alpha"), "x_k -> (x^_j|k --> x_j) -> (x^_0|j --> x_0)"),
        (leapalign(18, 7, 0.3), "x_18 -> (x^_7|18 --> x_7) -> (x^_0|7 --> x_0)"),
        (leaps(("k",)), "x_k -> (x^_0|k --> x_0)"),
        (refl("t"), "x_t -> x^_0|t"),
        (draft_lv(1), "x_1 -> x^_0|1\nx_0 ~> x_1^(0) -> x^_0|1"),
        (drtune(2, 1, {2}), "x_2 -[v(sg x_2)]-> x^_1|2 -[v_1 recorded]-> x^_0|1"),
        (Plan(noise().leap(0)), "x_T -> x^_0|T"),
        (Plan(latent(3).detach().leap(0)), "sg(x_3) -> x^_0|3"),
        (Plan(latent(3).leap(0, velocity=latent(3).velocity("guided").scale(2))), "x_3 -[2.0*v.guided_3]-> x^_0|3"),
        (
            Plan(latent(3).advance(0, [latent(3).velocity(), recorded(5)])),
            "x_3 -[lagrange: v_3, v_5 recorded]-> x^_0|3",
        ),
        (Plan(latent(0).renoise(2).leap(1).recover()), "x_0 ~> x_2^(0) -> x^_1|2 ~> x^_0|1"),
    ],
)
def test_str_is_the_paper_s_arrows(plan, arrows):
    assert str(plan) == arrows


@given(plans(STEPS, fields=("guided",), calls=1))
def test_repr_is_code_that_builds_the_plan(plan):
    assume("nodes>" not in repr(plan))
    names = {name: getattr(trajsurgery, name) for name in ("Plan", "StepGain", "latent", "noise", "recorded")}
    assert eval(repr(plan), names) == plan


@given(plans(STEPS))
def test_str_has_a_line_for_each_output(plan):
    assert len(str(plan).splitlines()) == len(plan.outputs)


def test_exact_is_connected_at_the_image():
    assert leapalign(5, 2).exact
    assert leaps((5, 4, 1)).exact
    assert Plan(leapalign(5, 2).outputs[0].discount(0.5)).exact
    assert not refl(3).exact
    assert not drtune(6, 2, {4}).exact
    assert not draft_lv(1).exact
    assert not Plan(latent(5).leap(2).connect()).exact
    assert not Plan(leapalign(5, 2).outputs[0], latent(3).leap(0)).exact


def test_the_graph_has_times_outputs_and_gradients():
    plan = Plan(latent(5).leap(2).detach().leap(0, discount=0.5))
    graph = plan.graph
    assert set(graph) == set(plan.nodes)
    (output,) = plan.outputs
    assert graph.nodes[output] == {"op": "leap", "t": 0, "output": True}
    blocked = {(a.op, b.op) for a, b, gradient in graph.edges(data="gradient") if not gradient}
    assert blocked == {("leap", "detach")}
    assert graph.number_of_edges() == sum(len(set(node.parents)) for node in plan.nodes)


def test_the_repr_of_a_large_plan_is_short():
    """Written out, the shared node doubles the expression at every leap."""
    x = latent(12)
    for t in range(11, 0, -1):
        x = x.leap(t, velocity=x.discount(0.5).velocity().scale(0.5))
    assert repr(Plan(x.leap(0))) == "Plan(<1 outputs of 47 nodes>)"
    assert len(repr(Plan(latent(3).leap(0)))) < 40
