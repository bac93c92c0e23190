"""A misspelt name is answered with the known name that is spelt most like it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import trajsurgery
from trajsurgery import Plan, latent, tiny
from trajsurgery.errors import suggest
from trajsurgery.surgery.parameters import field_named
from trajsurgery.testing import MLP


def call_a_missing_field() -> object:
    return field_named({None: MLP(2), "guided": MLP(2)}, "guide")


def read_a_plan_with_a_misspelt_primitive() -> object:
    plan = Plan(latent(1).leap(0)).to_dict()
    return Plan.from_dict({**plan, "nodes": [{**n, "op": n["op"].replace("leap", "leep")} for n in plan["nodes"]]})


MISSPELT: dict[str, tuple[Callable[[], object], str]] = {
    "a name of the package": (lambda: trajsurgery.leapaling, "leapalign"),
    "a name of a plan": (lambda: Plan(latent("start").leap(0)).at(strat=3), "start"),
    "a field": (call_a_missing_field, "guided"),
    "a primitive": (read_a_plan_with_a_misspelt_primitive, "leap"),
    "a scorer": (lambda: tiny.Reward("scorre"), "scorer"),
}


@pytest.mark.parametrize("call, name", MISSPELT.values(), ids=MISSPELT)
def test_the_nearest_known_name_is_suggested(call: Callable[[], object], name: str) -> None:
    with pytest.raises(Exception, match=re.escape(f"Did you mean {name!r}?")):
        call()


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("hpsv21", "hpsv2.1"),
        ("HPSV2.1", "hpsv2.1"),
        ("flux", "black-forest-labs/FLUX.1-dev"),
        ("zebra", None),
        ("", None),
    ],
)
def test_a_name_that_is_like_none_gets_no_suggestion(name: str, nearest: str | None) -> None:
    hint = suggest(name, ["hpsv2.1", "pickscore", "black-forest-labs/FLUX.1-dev"])
    assert hint == ("" if nearest is None else f" Did you mean {nearest!r}?")
