"""study/steps.py: a model uses tuned weights at the named steps and its original ones at the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.builders import toy_world
from trajsurgery.evaluation.held_out import HeldOutScores, evaluate
from trajsurgery.training import components
from trajsurgery.training.recipe import Recipe


def evaluate_tuned(recipe: Recipe, at: range) -> tuple[HeldOutScores, list[torch.Tensor]]:
    """Evaluate with tuned weights at all steps, or at none if `at` is empty; return the tuned weights too."""
    world = toy_world.world(recipe)
    torch.manual_seed(1)
    with torch.no_grad():
        weights = [p + 0.1 * torch.randn_like(p) for p in world.module.parameters()]
        for p, value in zip(world.module.parameters(), weights):
            p.copy_(value if at else p)
    return evaluate(recipe, world), weights


def test_weights_depend_on_the_step(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = script("study.steps").evaluate_mixed
    monkeypatch.setattr(components, "load", toy_world.world)
    recipe = toy_world.recipe(tmp_path)
    for times in (range(1, 6), range(0)):
        by_hand, weights = evaluate_tuned(recipe, times)
        assert torch.equal(mixed(recipe, weights, times).pictures, by_hand.pictures)
    ends = {times: mixed(recipe, weights, times).reward for times in (range(1, 4), range(4, 6))}
    assert not torch.equal(*ends.values())
    tuned_calls: list[bool] = []

    def recording_world(settings: Recipe) -> components.RunComponents:
        world = toy_world.world(settings)
        first = next(world.module.parameters())
        original_pointer = first.data_ptr()
        world.module.register_forward_hook(lambda *_: tuned_calls.append(first.data_ptr() != original_pointer))
        return world

    monkeypatch.setattr(components, "load", recording_world)
    mixed(recipe, weights, range(1, 4))
    assert tuned_calls[:5] == [False, False, True, True, True], "t = 5 and 4 untuned, 3, 2 and 1 tuned"
    assert tuned_calls == tuned_calls[:5] * 3, "three batches"
