"""Each optimiser and precision on a small regression, 200 steps from the same weights, against float32 AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.builders import toy_world
from trajsurgery import RecipeError
from trajsurgery.training.averages import start_averages, update_averages
from trajsurgery.training.components import load_pipeline, prepare_pipeline
from trajsurgery.training.model import precision
from trajsurgery.training.optimisers import make_optimiser, rate_remark, set_rate
from trajsurgery.training.settings import Optimiser, Trained
from trajsurgery.training.training_loop import training_step

STEPS = 200
BASE = Optimiser(rate=1e-3, weight_decay=0.0)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Torchao's step without compilation, which takes a minute."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        yield


def train_200_steps(settings: Optimiser, dtype: torch.dtype = torch.float32) -> tuple[float, Tensor]:
    """Train 200 steps: the last loss relative to the first, and the change of the weights."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)
    x = torch.randn(256, 64, generator=generator).to(dtype)
    y = torch.tanh(x @ torch.randn(64, 64, generator=generator).to(dtype) / 8)
    start = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    optimiser, losses = make_optimiser(settings, list(model.parameters())), list[float]()
    for i in range(STEPS):
        loss = (model(x) - y).float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        set_rate(optimiser, settings, i + 1)
        optimiser.step()
        losses.append(loss.item())
    return losses[-1] / losses[0], torch.cat([p.detach().float().flatten() for p in model.parameters()]) - start


def relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_optimisers_agree_on_a_small_model() -> None:
    loss, change = train_200_steps(BASE)
    assert loss < 0.1
    eight, eight_change = train_200_steps(replace(BASE, name="adamw8bit"))
    assert eight < 1.2 * loss
    assert 1e-4 < relative_distance(eight_change, change) < 0.2
    low, low_change = train_200_steps(replace(BASE, name="adamw8bit"), torch.bfloat16)
    assert low < 1.5 * loss
    assert 1e-2 < relative_distance(low_change, change) < 0.4
    factored, factored_change = train_200_steps(replace(BASE, name="adafactor", rate=1e-2))
    assert factored < 0.3
    assert relative_distance(factored_change, change) > 0.1  # Adafactor is another method


def test_stochastic_rounding_lets_bfloat16_weights_take_small_steps() -> None:
    """At a rate far below bfloat16's precision, rounding to nearest changes no weight; stochastic rounding does on
    average.
    """
    small = replace(BASE, name="adamw8bit", rate=1e-5)
    loss, change = train_200_steps(small)
    low, low_change = train_200_steps(small, torch.bfloat16)
    assert abs(low - loss) < 0.1
    assert torch.dot(low_change, change) / change.dot(change) == pytest.approx(1, abs=0.15)


def test_bfloat16_weights_without_stochastic_rounding_are_refused() -> None:
    for name in ("adamw", "adafactor"):
        settings: Any = replace(BASE, name=name)
        with pytest.raises(RecipeError, match="adamw8bit, which rounds stochastically"):
            train_200_steps(settings, torch.bfloat16)


def test_the_rate_rises_over_the_warm_up() -> None:
    settings = Optimiser(rate=0.5, warmup=4)
    for kind in ("adamw", "adamw8bit"):
        optimiser = make_optimiser(replace(settings, name=kind), [nn.Parameter(torch.zeros(3))])
        rates = []
        for i in range(1, 7):
            set_rate(optimiser, settings, i)
            rates.append(float(optimiser.param_groups[0]["lr"]))
        assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_averages_are_those_of_diffusers_in_float32_on_any_device() -> None:
    from diffusers.training_utils import EMAModel

    weights = [nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))]
    theirs, ours = EMAModel(weights, decay=0.9), start_averages(weights, 0.9, on_cpu=True)
    low = start_averages([nn.Parameter(weights[0].detach().bfloat16())], 0.9, on_cpu=False)
    assert low.shadow_params[0].dtype == torch.float32
    for _ in range(20):
        with torch.no_grad():
            weights[0].add_(0.1)
        theirs.step(weights)
        update_averages(ours, weights)
        update_averages(low, [weights[0].detach().bfloat16()])
    torch.testing.assert_close(ours.shadow_params, theirs.shadow_params)
    torch.testing.assert_close(low.shadow_params, theirs.shadow_params, rtol=1e-2, atol=1e-2)


def recipe_with(tmp_path: Path, **trained_settings: Any) -> Any:
    recipe = toy_world.recipe(tmp_path)
    rollout, settings = replace(recipe.rollout, precision="bfloat16"), Trained(**trained_settings)
    name: Any = "adamw8bit" if settings.weights == "bfloat16" else "adamw"
    return replace(recipe, rollout=rollout, train=settings, optimiser=replace(recipe.optimiser, name=name))


@pytest.mark.parametrize(
    "settings, frozen, training",
    [
        ({}, None, torch.float32),
        ({"weights": "bfloat16"}, None, torch.bfloat16),
        ({"what": "lora"}, torch.bfloat16, torch.float32),
        ({"what": "lora", "base": "float32"}, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_weights_have_the_recipe_s_dtype_and_a_step_changes_them(
    settings: dict[str, Any], frozen: Any, training: Any, tmp_path: Path
) -> None:
    from trajsurgery.training.checkpoints.checkpoint import resume, save
    from trajsurgery.training.checkpoints.training_state import TrainingState
    from trajsurgery.training.components import PromptCache

    recipe = recipe_with(tmp_path, **settings)
    world = toy_world.world(recipe)
    kinds = {p.dtype for p in world.module.parameters() if not p.requires_grad}
    assert kinds == ({frozen} if frozen else set())
    state = TrainingState.start(recipe, world.module)
    assert {p.dtype for p in state.parameters} == {training}
    assert {average.dtype for average in state.ema.shadow_params} == {torch.float32}
    before = [p.detach().clone() for p in state.parameters]
    record = training_step(recipe, world, PromptCache(world.pipe, world.texts), state, 0.9)
    assert not record.skipped
    assert not all(map(torch.equal, state.parameters, before))
    save(recipe, state)
    fresh = TrainingState.start(recipe, toy_world.world(recipe).module)
    assert resume(recipe, fresh)
    assert all(map(torch.equal, fresh.parameters, state.parameters))


def test_an_int8_base_trains_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pipe = toy_world.pipeline()
    pipe.save_pretrained(folder)
    recipe = recipe_with(tmp_path, what="lora", base="int8")
    pipe = prepare_pipeline(load_pipeline(str(folder), "cpu", recipe.train), recipe)
    frozen = {type(p).__name__ for p in pipe.transformer.parameters() if not p.requires_grad}
    assert "Int8Tensor" in frozen
    world = toy_world.components(pipe)
    from trajsurgery.training.checkpoints.training_state import TrainingState
    from trajsurgery.training.components import PromptCache

    state = TrainingState.start(recipe, world.module)
    record = training_step(recipe, world, PromptCache(world.pipe, world.texts), state, 0.9)
    assert record.grad_norm > 0
    with pytest.raises(RecipeError, match="need a folder or hub id"):
        load_pipeline("tiny", "cpu", recipe.train)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"--train\.base nf4 needs bitsandbytes: pip install"):
        precision.quantisation(Trained("lora", base="nf4"))


def test_a_rate_that_is_low_for_adapters_is_told() -> None:
    assert "low for adapters" in str(rate_remark(Trained("lora"), Optimiser(rate=3e-5)))
    assert rate_remark(Trained("lora"), Optimiser(rate=1e-4)) is None
    assert rate_remark(Trained(), Optimiser(rate=3e-5)) is None
