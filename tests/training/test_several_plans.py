"""Several plans on one rollout: the gradient is the mean of theirs, and the rollout is made once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.builders import toy_world
from tests.builders.problems import distance
from tests.training.test_training_loop import gradient, ran
from trajsurgery import DRTune, FlowBPLagrange, LeapAlign, Plan, ReFL, leapalign
from trajsurgery.training.preflight import check_recipe
from trajsurgery.training.recipe import RecipeError

PLANS = (leapalign(4, 1, 0.3), leapalign(3, 2, 0.3), leapalign(5, 3, 0.3))


@dataclass(frozen=True)
class Given:
    """Draws these plans in turn."""

    plans: tuple[Plan, ...]
    turns: count

    weights_at = "all"

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        return self.plans[next(self.turns) % len(self.plans)]


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged", "split"])
def test_the_gradient_is_the_mean_of_the_plans(memory: str, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    alone = [gradient(recipe, Given((plan,), count())) for plan in PLANS]
    wanted = [torch.stack(parts).mean(0) for parts in zip(*alone, strict=True)]
    found = gradient(recipe, Given(PLANS, count()), plans=3, memory=memory)
    assert distance(found, wanted) < 1e-5
    assert min(distance(one, wanted) for one in alone) > 1e-2
    assert distance(gradient(recipe, Given(PLANS, count()), plans=3, memory=memory, at_once=3), wanted) < 1e-5


@pytest.mark.parametrize("method", [LeapAlign(), FlowBPLagrange(), DRTune(last=3, connected=True)], ids=str)
def test_methods_learn_by_several_plans(method: object, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, method)
    _, seen = ran(replace(recipe, rollout=replace(recipe.rollout, plans=2)))
    assert seen[-1].reward > seen[0].reward + 0.03
    assert all(record.weight > 0 and record.loss > 0 for record in seen)


def test_the_rollout_and_the_decode_are_made_once(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=1)
    recipe = replace(recipe, rollout=replace(recipe.rollout, plans=4))
    world = toy_world.world(recipe)
    calls = {"transformer": 0, "decoder": 0}

    def counting(name: str):
        return lambda *_: calls.update({name: calls[name] + 1})

    world.pipe.transformer.register_forward_pre_hook(counting("transformer"))
    world.pipe.vae.decoder.register_forward_pre_hook(counting("decoder"))
    ran(recipe, world)
    assert calls == {"transformer": 5 + 4 * 2, "decoder": 1}


def test_plans_that_do_not_end_in_the_image_are_refused_before_the_run(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, ReFL(last=3))
    with pytest.raises(RecipeError, match=r"--rollout.plans 2.*ReFL"):
        check_recipe(replace(recipe, rollout=replace(recipe.rollout, plans=2)))
    with pytest.raises(RecipeError, match=r"rollout\.plans = 0"):
        replace(recipe, rollout=replace(recipe.rollout, plans=0))
