"""Several plans on one rollout: the gradient is their mean, and the rollout is computed once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.builders import toy_world
from tests.builders.problems import distance
from tests.training.test_training_loop import gradient, run_loop
from trajsurgery import DRTune, FlowBPLagrange, LeapAlign, Plan, ReFL, leapalign
from trajsurgery.training.checks.preflight import check_recipe
from trajsurgery.training.recipe import RecipeError

PLANS = (leapalign(4, 1, 0.3), leapalign(3, 2, 0.3), leapalign(5, 3, 0.3))


@dataclass(frozen=True)
class FixedPlans:
    """A method that returns these plans in turn."""

    plans: tuple[Plan, ...]
    turns: count

    weights_at = "all"

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        return self.plans[next(self.turns) % len(self.plans)]


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged", "split"])
def test_the_gradient_is_the_mean_of_the_plans(memory: str, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    single = [gradient(recipe, FixedPlans((plan,), count())) for plan in PLANS]
    expected = [torch.stack(parts).mean(0) for parts in zip(*single, strict=True)]
    combined = gradient(recipe, FixedPlans(PLANS, count()), plans=3, memory=memory)
    assert distance(combined, expected) < 1e-5
    assert min(distance(one, expected) for one in single) > 1e-2
    assert distance(gradient(recipe, FixedPlans(PLANS, count()), plans=3, memory=memory, at_once=3), expected) < 1e-5


@pytest.mark.parametrize("method", [LeapAlign(), FlowBPLagrange(), DRTune(last=3, connected=True)], ids=str)
def test_methods_learn_with_several_plans(method: object, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, method)
    _, records = run_loop(replace(recipe, rollout=replace(recipe.rollout, plans=2)))
    assert records[-1].reward > records[0].reward + 0.03
    assert all(record.weight > 0 and record.loss > 0 for record in records)


def test_the_rollout_and_the_decoding_run_once(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=1)
    recipe = replace(recipe, rollout=replace(recipe.rollout, plans=4))
    world = toy_world.world(recipe)
    calls = {"transformer": 0, "decoder": 0}

    def counting(name: str):
        return lambda *_: calls.update({name: calls[name] + 1})

    world.pipe.transformer.register_forward_pre_hook(counting("transformer"))
    world.pipe.vae.decoder.register_forward_pre_hook(counting("decoder"))
    run_loop(recipe, world)
    assert calls == {"transformer": 5 + 4 * 2, "decoder": 1}


def test_plans_that_do_not_end_in_the_image_are_refused_before_the_run(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, ReFL(last=3))
    with pytest.raises(RecipeError, match=r"--rollout.plans 2.*ReFL"):
        check_recipe(replace(recipe, rollout=replace(recipe.rollout, plans=2)))
    with pytest.raises(RecipeError, match=r"rollout\.plans = 0"):
        replace(recipe, rollout=replace(recipe.rollout, plans=0))
