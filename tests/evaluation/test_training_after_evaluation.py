"""Held-out evaluation leaves nothing behind that a later backward pass can't use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import toy_world
from trajsurgery.evaluation.held_out import evaluate
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache, RunComponents
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import training_step


class Remembers(toy_world.LikesRed):
    """The reward times a factor for each prompt that it computes once, as users' rewards keep embeddings of prompts."""

    def __init__(self) -> None:
        self.factors: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        factors = [self.factors.setdefault(prompt, torch.tensor(1.0 + len(prompt))) for prompt in prompts]
        scores = super().__call__(images, prompts)
        return torch.stack([score * factor for score, factor in zip(scores, factors, strict=True)])


def world_with_rotary_cache(settings: Recipe) -> RunComponents:
    """The transformer computes the rotary embedding of a shape once, as Qwen-Image's does on a GPU."""
    world, cache = toy_world.world(settings), dict[torch.Size, Any]()
    embed = world.module.pos_embed.forward

    def cached(ids: Tensor) -> Any:
        if ids.shape not in cache:
            cache[ids.shape] = embed(ids)
        return cache[ids.shape]

    world.module.pos_embed.forward = cached
    return world


@pytest.mark.parametrize("reward", [toy_world.LikesRed, Remembers])
def test_an_evaluation_changes_no_iteration(reward: type[toy_world.LikesRed], tmp_path: Path) -> None:
    settings, results = toy_world.recipe(tmp_path), list[list[Tensor]]()
    for evaluated in (False, True):
        world = replace(world_with_rotary_cache(settings), reward=reward())
        training = TrainingState.start(settings, world.module)
        for _ in range(2):
            if evaluated:
                evaluate(settings, world)
            training_step(settings, world, PromptCache(world.pipe, world.texts), training, 0.9)
        results.append([p.detach() for p in training.parameters])
    assert all(map(torch.equal, *results))
