"""The model of scaling out, its measured iterations, and the report of both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.engine import scaling_out
from benchmarks.engine.scaling_out_measured import ALONE, measure
from benchmarks.engine.scaling_out_predicted import Network, predict, traffic
from tests.dry_run.test_memory import PLAN, recipe, small
from trajsurgery import plan_memory
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Hardware

RECORD = json.loads((scaling_out.Options().output / "scaling_out.json").read_text())


def on(gpus: int, per_node: int, shard: str, gather: str) -> Recipe:
    settings = recipe("flux", batch=8, at_once=1, memory="retain")
    return replace(settings, shard=shard, gather=gather, hardware=Hardware(gpus=gpus, per_node=per_node))


def received(settings: Recipe) -> tuple[float, float, float]:
    plan = plan_memory(settings, PLAN, found=small("flux"))
    moved = traffic(settings, plan)
    weights, gradient = 2 * plan.parameters, 4 * plan.trained
    return moved.gathered / weights, moved.reduced / gradient, moved.across / gradient


def test_bytes_that_a_gpu_receives() -> None:
    """In units of all weights and of all gradients; two calls of six steps with gradient, memory retain."""
    assert received(on(1, 8, "none", "iteration")) == (0, 0, 0)
    assert received(on(2, 8, "fsdp", "iteration")) == pytest.approx((1 / 2, 1 / 2, 0))
    assert received(on(4, 2, "fsdp", "iteration")) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert received(on(4, 8, "ddp", "iteration")) == pytest.approx((0, 3 / 2, 0))  # as a ring: 2 (n - 1) / n
    rollouts, gathers = 2, 2 * (6 + 2)
    assert received(on(4, 2, "fsdp", "layer")) == pytest.approx((gathers / 2, rollouts / 2, 1 / 2))


def test_an_iteration_takes_between_its_compute_and_the_sum() -> None:
    settings = on(4, 2, "fsdp", "layer")
    slow = predict(settings, Network(within=1.0, across=1.0))
    assert slow["seconds"][0] == slow["communication_seconds"] == slow["received_bytes"]
    fast = predict(settings, Network(within=1e30, across=1e30))
    assert fast["seconds"] == pytest.approx([fast["compute_seconds"]] * 2)


def test_the_loop_is_measured() -> None:
    row = measure(ALONE["one process"], batch=2, iterations=2)
    assert 0 < row["seconds"]["median"] < 60
    assert row["processor_seconds"]["median"] > 0


def test_the_report_says_what_was_predicted_and_what_measured(tmp_path: Path) -> None:
    text = scaling_out.as_markdown(RECORD)
    assert text == (scaling_out.Options().output / "scaling_out.md").read_text()
    predicted, measured = text.split("## measured")
    assert "No such run was made" in predicted
    assert "2 cores" in measured
    assert {row["gpus"] for row in RECORD["predicted"]["rows"]} == {1, 2, 4, 8, 16}
    assert {(row["processes"], row["threads"]) for row in RECORD["measured"]["rows"]} == {(1, 1), (2, 1), (4, 1)}
    scaling_out.draw_picture(RECORD, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
