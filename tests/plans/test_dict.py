"""Plans as data: dicts, JSON, pickle, equality and hash."""

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajsurgery import Plan, PlanError, latent, leapalign
from trajsurgery.testing import plans

STEPS = 6


@given(plans(STEPS, fields=("guided",)))
def test_dict_round_trip(plan):
    data = plan.to_dict()
    back = Plan.from_dict(data)
    assert back == plan
    assert back.outputs == plan.outputs  # the very nodes
    assert back.steps == plan.steps
    assert back.to_dict() == data


@given(plans(STEPS, fields=("guided",)))
def test_json_and_pickle_round_trips(plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan


@given(plans(STEPS), plans(STEPS))
def test_equality_and_hash_are_structure(a, b):
    assert (a == b) == (a.to_dict() == b.to_dict())
    if a == b:
        assert hash(a) == hash(b)
    assert a != "a plan"


def test_equality_compares_steps_and_order_of_outputs():
    x, y = latent(3).leap(0), latent(2).leap(0)
    assert Plan(x, y) != Plan(y, x)
    assert Plan(x, steps=3) != Plan(x)
    assert len({Plan(x), Plan(latent(3).leap(0)), Plan(x, steps=3)}) == 2


def test_a_plan_is_immutable():
    plan = leapalign(5, 2)
    with pytest.raises(AttributeError):
        plan.outputs = ()
    with pytest.raises(AttributeError):
        plan.steps = 3


def test_a_leap_may_be_written_with_its_discount():
    data = {"nodes": [{"op": "latent", "time": 4}, {"op": "leap", "x": 0, "to": 0, "discount": 0.5}], "outputs": [1]}
    assert Plan.from_dict(data) == Plan(latent(4).leap(0, discount=0.5))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"nodes": [], "outputs": [0]},
        {"nodes": [{"op": "latent", "time": 3}]},
        {"nodes": [{"op": "latent"}], "outputs": [0]},
        {"nodes": [{"time": 3}], "outputs": [0]},
        {"nodes": [{"op": "warp", "time": 3}], "outputs": [0]},
        {"nodes": [{"op": "latent", "time": 3, "colour": 1}], "outputs": [0]},
        {"nodes": [{"op": "velocity", "x": 0}], "outputs": [0]},
        {"nodes": [{"op": "velocity", "x": 1}, {"op": "latent", "time": 3}], "outputs": [0]},
        {"nodes": [{"op": "latent", "time": 3}], "outputs": [1]},
        {"nodes": [{"op": "latent", "time": 3}], "outputs": [-1]},
        {"nodes": [{"op": "latent", "time": [3]}], "outputs": [0]},
        {"nodes": 3, "outputs": [0]},
    ],
)
def test_malformed_dicts_are_refused(data):
    with pytest.raises(PlanError, match=r"to_dict|unknown op"):
        Plan.from_dict(data)


SCRAP = st.sampled_from((None, True, -1, 0, 1, 3, 7, 0.5, "k", "T", "", "a b", float("nan"), (), "rollout"))


@given(plans(STEPS), st.data())
def test_a_corrupted_dict_gives_a_plan_or_a_plan_error(plan, data):
    corrupted = plan.to_dict()
    for _ in range(data.draw(st.integers(1, 3))):
        entry = data.draw(st.sampled_from(corrupted["nodes"]))
        entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(SCRAP)
    try:
        read = Plan.from_dict(corrupted)
    except PlanError:
        return
    assert Plan.from_dict(read.to_dict()) == read
    assert str(read)
    assert repr(read)
