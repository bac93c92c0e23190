"""Nodes: structural sharing, identity, immutability."""

import copy
import dataclasses

import pytest
from hypothesis import given

from trajsurgery import Plan, apply, latent, noise, recorded
from trajsurgery.plans.nodes import PRIMITIVES, Node, walk
from trajsurgery.testing import MOVES, plans

STEPS = 6


def one_of_each() -> dict[str, Node]:
    """A new node of every primitive."""
    x, v = latent(5), latent(5).velocity()
    return {
        "latent": latent(3),
        "noise": noise(),
        "recorded": recorded(2),
        "velocity": x.velocity("guided"),
        "leap": x.leap(2, discount=0.5),
        "advance": x.advance(1, [v, recorded(6)], rule="adams-bashforth"),
        "connect": x.leap(3).connect(),
        "discount": x.discount(0.25),
        "detach": x.detach(),
        "scale": v.scale(3.0),
        "detach_velocity": v.detach(),
        "renoise": latent(0).renoise(4, draw=2),
        "recover": latent(0).renoise(4, draw=2).recover(draw=2),
    }


@pytest.mark.parametrize("op", PRIMITIVES)
def test_equal_nodes_are_one_object(op):
    assert one_of_each()[op] is one_of_each()[op]


@pytest.mark.parametrize("op", PRIMITIVES)
def test_op_is_the_primitive_s_name(op):
    node = one_of_each()[op]
    assert node.op == op
    assert type(node) is PRIMITIVES[op]


@pytest.mark.parametrize("op", PRIMITIVES)
def test_nodes_are_immutable(op):
    node = one_of_each()[op]
    for field in dataclasses.fields(node):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, field.name, None)


@pytest.mark.parametrize("op", PRIMITIVES)
def test_copies_are_the_node_itself(op):
    node = one_of_each()[op]
    assert copy.copy(node) is node
    assert copy.deepcopy(node) is node


def test_every_primitive_has_a_strategy():
    assert set(MOVES) == set(PRIMITIVES) == set(one_of_each())


def test_different_settings_are_different_nodes():
    x = latent(5)
    assert x.leap(2) is not x.leap(3)
    assert x.velocity() is not x.velocity("guided")
    assert x.discount(0.5) is not x.discount("a")
    assert latent(0).renoise(2, draw=0) is not latent(0).renoise(2, draw=1)
    assert noise() is not latent("T")


def test_integer_and_float_factors_are_one_node():
    assert latent(5).discount(1) is latent(5).discount(1.0)


def test_a_velocity_s_discount_is_its_scale():
    v = latent(5).velocity()
    assert v.discount(2) is v.scale(2.0)


def test_two_leaps_share_one_call(rolled):
    inputs = []

    def counted(x, sigma):
        inputs.append(float(sigma))
        return rolled.field(x, sigma)

    x = latent(7)
    apply(Plan(x.leap(5), x.leap(3)), rolled.trajectory, counted)
    assert len(inputs) == 1
    apply(Plan(x.leap(5), x.leap(3, discount=0.5)), rolled.trajectory, counted)
    assert len(inputs) == 3


@given(plans(STEPS))
def test_nodes_come_after_their_parents(plan):
    seen = set()
    for node in plan.nodes:
        assert seen.issuperset(node.parents)
        seen.add(node)
    assert len(plan.nodes) == len(seen)
    assert tuple(walk(plan.outputs)) == plan.nodes
