"""Ranges of the profile: a stage's seconds are its own, and the ranges change nothing and are gone afterwards."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import profile
from tests.builders import toy_world
from trajsurgery.training.components import PromptCache
from trajsurgery.training.settings import Objective

Span = namedtuple("Span", "start end")
Event = namedtuple("Event", "name time_range")


def test_seconds_of_inner_ranges_are_not_the_outer_one_s() -> None:
    spans = {"a": (0, 10e6), "b": (1e6, 4e6), "c": (2e6, 3e6), "b ": (5e6, 7e6), "d": (7e6, 8e6)}
    events = [Event(profile.PREFIX + name.strip(), Span(*span)) for name, span in spans.items()]
    events.append(Event("aten::mul", Span(0, 9e6)))
    assert profile.own_seconds(events) == pytest.approx({"a": 4, "b": 4, "c": 1, "d": 1})


def test_an_iteration_s_seconds_are_those_of_its_stages(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, objective=Objective(threshold=0.9, tau=0.01))
    world = toy_world.world(recipe)
    before = dict(vars(torch.Tensor)), type(world.pipe).__call__, torch.autograd.backward
    subject = profile.Subject(recipe, world, PromptCache(world.pipe, world.texts))
    result: dict[str, Any] = profile.measure(subject, profile.Options(iterations=2, warmup=1))
    assert (dict(vars(torch.Tensor)), type(world.pipe).__call__, torch.autograd.backward) == before
    assert sum(stage["share"] for stage in result["stages"].values()) == pytest.approx(1)
    assert result["stages"].keys() == set(profile.STAGES)
    assert min(stage["median"] for stage in result["stages"].values()) > 0
    record = {"subjects": {"toy": result}, **profile.provenance()}
    assert "| backward: transformer |" in profile.table(record)
