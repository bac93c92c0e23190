"""study/steps.py: a model has its tuned weights at the steps that are named, and its own at the others."""

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


def tuned(recipe: Recipe, at: range) -> tuple[HeldOutScores, list[torch.Tensor]]:
    """The evaluation by hand, one model for all steps or one for none; and the weights."""
    found = toy_world.world(recipe)
    torch.manual_seed(1)
    with torch.no_grad():
        own = [p + 0.1 * torch.randn_like(p) for p in found.module.parameters()]
        for p, value in zip(found.module.parameters(), own):
            p.copy_(value if at else p)
    return evaluate(recipe, found), own


def test_weights_go_by_the_step(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = script("study.steps").evaluate_mixed
    monkeypatch.setattr(components, "load", toy_world.world)
    recipe = toy_world.recipe(tmp_path)
    for at in (range(1, 6), range(0)):
        by_hand, weights = tuned(recipe, at)
        assert torch.equal(mixed(recipe, weights, at).pictures, by_hand.pictures)
    ends = {at: mixed(recipe, weights, at).reward for at in (range(1, 4), range(4, 6))}
    assert not torch.equal(*ends.values())
    seen: list[bool] = []

    def watched(settings: Recipe) -> components.RunComponents:
        found = toy_world.world(settings)
        first = next(found.module.parameters())
        own = first.data_ptr()
        found.module.register_forward_hook(lambda *_: seen.append(first.data_ptr() != own))
        return found

    monkeypatch.setattr(components, "load", watched)
    mixed(recipe, weights, range(1, 4))
    assert seen[:5] == [False, False, True, True, True], "t = 5 and 4 untuned, 3, 2 and 1 tuned"
    assert seen == seen[:5] * 3, "three batches"
