"""The figures of docs/how-to/your-hardware.md are those of the dry run and of the measurements that it names."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trajsurgery.cli import recipe_script, train_command
from trajsurgery.dry_run import plan_memory
from trajsurgery.dry_run.model_costs import Measurements
from trajsurgery.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/your-hardware.md").read_text()
RESULTS = ROOT / "benchmarks/engine/results"
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and ".py" in line]
PREDICTED = [row for row in ROWS if "predicted" in row[3]]


def recipe_of(cards: str, command: str, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe that a row's command runs, planned for the row's number of cards."""
    words = shlex.split(command.strip("`"))
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    recipes = importlib.import_module(words[script].removesuffix(".py").replace("/", ".")).RECIPES
    parsed: list[Any] = []
    monkeypatch.setattr(train_command, "dry_run", lambda recipe, *_: parsed.append(recipe) or 0)
    assert recipe_script.cli(recipes, "", [*words[script + 1 :], "--dry-run"]) == 0
    return replace(parsed[0], hardware=replace(parsed[0].hardware, gpus=int(cards.split()[0])))


@functools.cache
def measurements(model: str) -> Measurements:
    """Those of a model, which rows share: they take most of the time."""
    return Measurements()


@pytest.mark.slow
@pytest.mark.parametrize("row", PREDICTED, ids=lambda row: f"{row[0]}, {row[1]}")
def test_predictions_are_those_of_the_dry_run(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cards, _, command, memory, seconds = row
    recipe = recipe_of(cards, command, monkeypatch)
    plan = plan_memory(recipe, measurements=measurements(recipe.model))
    assert plan.fits
    for cell, unit, value in ((memory, "GiB", plan.peak / 2**30), (seconds, "s", plan.seconds)):
        for shown in re.findall(rf"([\d.]+) {unit} predicted", cell):
            assert float(shown) == round(value, len(shown.partition(".")[2])), unit


def test_each_figure_says_where_it_comes_from() -> None:
    assert len(ROWS) >= 6
    assert len(PREDICTED) >= 5
    for *_, memory, seconds in ROWS:
        for cell in (memory, seconds):
            for part in re.split(r", |; ", cell):
                assert part in ("", "-") or re.search(r"\d.*(predicted|measured)", part), part


@pytest.mark.parametrize("preset", ["lora-80gb", "full-80gb"])
def test_measurements_are_those_of_the_file(preset: str) -> None:
    figures = json.loads((RESULTS / "gpu_presets.json").read_text())["sections"][preset.replace("-", "_")]["figures"]
    iteration = figures["iteration 3, 2 images"]
    (row,) = [row for row in ROWS if row[1] == preset]
    assert f"{iteration['peak_gib']:.1f} GiB measured" in row[3]
    assert f"{iteration['seconds']:.1f} s measured" in row[4]


def test_two_processes_are_those_of_the_file() -> None:
    record = json.loads((RESULTS / "two_ranks.json").read_text())
    for shard in ("ddp", "fsdp"):
        (row,) = [row for row in ROWS if f"--shard {shard}" in row[2]]
        assert f"{record[shard]['seconds_an_iteration']['median']:.1f} s measured" in row[4]
        assert record[shard]["reward_gain"] > 3 * record[shard]["reward_gain_se"]
