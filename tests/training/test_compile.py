"""`--rollout.compile`, `--decoder.compile` and `--compile-reward`: eager gradients, names and images, no new graphs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import nn
from torch._dynamo.utils import counters

from tests.builders import toy_world
from tests.builders.problems import distance
from tests.builders.small_pipelines import PIPELINES
from tests.training.test_ranks import exact_world, first_gradient, recipe_of, spawn
from trajsurgery import LeapAlign, RecipeError, leapalign, operate, tiny
from trajsurgery.training.anchor import swapped
from trajsurgery.training.checkpoints.checkpoint import discard
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.checks import compile_trial
from trajsurgery.training.components import PromptCache
from trajsurgery.training.model import compilation
from trajsurgery.training.model.compilation import compile_blocks, compile_decoder, compile_image_tower
from trajsurgery.training.settings import Guards, Trained
from trajsurgery.training.training_loop import training_step

# both are torch's own, about what it traces: a tensor that is no leaf, and diffusers' cached look-up for checkpointing
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

COMPILED = 1e-10
"""Relative difference of compiled and eager gradients in float64."""

INDUCTOR = pytest.mark.skipif("INDUCTOR" not in os.environ, reason="compiles C++ for minutes; INDUCTOR=1 runs it")

RUNS = (("leapalign", "split", False), ("leapalign", "retain", True), ("leapalign", "split", "lora"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """No graphs of other tests. The backend traces and guards as the default one does, and runs the graph eagerly."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """The number of graphs compiled so far."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_gradients_and_figures_are_the_eager_ones(tmp_path: Path, run: tuple[str, str, Any]) -> None:
    figures, expected = first_gradient(recipe_of(tmp_path, run))
    assert not graphs()
    compiled_figures, gradient = first_gradient(recipe_of(tmp_path, run, compile=True))
    assert graphs()
    assert distance(gradient, expected) <= COMPILED
    assert compiled_figures == pytest.approx(figures, rel=1e-5)  # float32


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_gradients_of_real_backends_are_the_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", backend)
    _, expected = first_gradient(recipe_of(tmp_path, RUNS[0]))
    _, gradient = first_gradient(recipe_of(tmp_path, RUNS[0], compile=True))
    assert graphs()
    assert distance(gradient, expected) <= COMPILED


@pytest.mark.parametrize("trained", [Trained(), Trained("lora", rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ten_iterations_compile_nothing_after_the_first(tmp_path: Path, trained: Trained, checkpointing: bool) -> None:
    """The times are drawn anew each time; the anchor enters the loop again; averages swap in after each iteration."""
    recipe = toy_world.recipe(tmp_path, LeapAlign(), train=trained, guards=Guards(anchor=0.1))
    recipe = replace(recipe, rollout=replace(recipe.rollout, compile=True, checkpointing=checkpointing))
    world = toy_world.world(recipe)
    training, counts, times = TrainingState.start(recipe, world.module), list[int](), set[tuple[int, ...]]()
    for _ in range(10):
        times.add(training_step(recipe, world, PromptCache(world.pipe, world.texts), training, 0.9).times)
        with swapped(world.module, training.ema.shadow_params), torch.no_grad():
            world.pipe("a circle", num_inference_steps=2, height=16, width=16, output_type="pt")
        counts.append(graphs())
    assert len(times) > 3
    assert counts[0]
    assert counts == [counts[0]] * 10


@pytest.mark.parametrize("guidance", ["both", "conditional"])
def test_both_sides_of_guidance_and_replayed_calls_compile_once(monkeypatch: pytest.MonkeyPatch, guidance: Any) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    small, counts = PIPELINES["sd3"](torch.float32), list[int]()
    compile_blocks(small.pipe.transformer)
    for k, j in ((5, 2), (6, 1), (3, 2)):
        with operate(small.pipe, leapalign(k, j), "split", guidance_gradient=guidance) as surgery:
            small()
        surgery.outputs[0].sum().backward()
        surgery.field(surgery.trajectory[k], surgery.trajectory.sigma(k)).sum().backward()
        counts.append(graphs())
    assert counts[0]
    assert counts == [counts[0]] * 3


def test_names_images_and_what_is_saved_are_the_eager_ones(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    eager, compiled = (
        toy_world.world(replace(recipe, rollout=replace(recipe.rollout, compile=on))).pipe for on in (False, True)
    )
    assert list(compiled.transformer.state_dict()) == list(eager.transformer.state_dict())
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    images = [pipe("a circle", **call, generator=torch.Generator().manual_seed(3)).images for pipe in (eager, compiled)]
    with operate(compiled, leapalign(2, 1)):
        operated = compiled("a circle", **call, generator=torch.Generator().manual_seed(3)).images
    assert graphs()
    assert torch.equal(operated, images[1])
    assert torch.allclose(images[1], images[0], atol=1e-5)
    compiled.transformer.save_pretrained(tmp_path / "saved")
    loaded = type(eager.transformer).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), compiled.transformer.parameters(), strict=True))


def write_errors(folder: Path) -> None:
    """Run on each rank: the gradient's distance from one eager process's, by way of sharing the model."""
    compilation.BACKEND = "eager"
    _, expected = torch.load(folder / "expected.pt")
    errors = {
        way: distance(first_gradient(recipe_of(folder, RUNS[0], way, compile=True))[1], expected)
        for way in ("ddp", "fsdp", "fsdp by layer")
    }
    (folder / f"errors-{torch.distributed.get_rank()}").write_text(json.dumps([errors, graphs()]))


def test_two_ranks_with_compiled_blocks_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    torch.save(first_gradient(recipe_of(tmp_path, RUNS[0])), tmp_path / "expected.pt")
    spawn(2, write_errors, tmp_path)
    for rank in range(2):
        errors, compiled = json.loads((tmp_path / f"errors-{rank}").read_text())
        assert compiled
        assert max(errors.values()) <= COMPILED, errors


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_decoder_has_the_eager_image_and_gradient(tmp_path: Path, checkpointing: bool) -> None:
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for on in (False, True):
        recipe = toy_world.recipe(tmp_path)
        recipe = replace(recipe, decoder=replace(recipe.decoder, compile=on, checkpointing=checkpointing))
        pipe = toy_world.world(recipe).pipe
        nn.Module.to(pipe.vae, torch.float64)
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        image = pipe.vae.decode(z, return_dict=False)[0]
        results.append((image.detach(), torch.autograd.grad(image.square().sum(), z)[0]))
    assert graphs()
    for eager, compiled in zip(*results, strict=True):
        assert distance([compiled], [eager]) <= COMPILED


def test_a_compiled_image_tower_has_the_eager_scores_and_gradient() -> None:
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for on in (False, True):
        reward = tiny.Reward().double()
        names = list(reward.state_dict())
        if on:
            compile_image_tower("tiny", reward)
        assert list(reward.state_dict()) == names
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        scores = reward(images.requires_grad_(), ["a red circle", "a blue square"])
        results.append((scores.detach(), torch.autograd.grad(scores.sum(), images)[0]))
    assert graphs()
    for eager, compiled in zip(*results, strict=True):
        assert distance([compiled], [eager]) <= COMPILED


def test_what_has_nothing_to_compile_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"--rollout\.compile: Linear has no repeated blocks"):
        compile_blocks(nn.Linear(2, 2))
    with pytest.raises(RecipeError, match=r"--decoder\.compile: Linear has no decoder"):
        compile_decoder(nn.Linear(2, 2))
    with pytest.raises(RecipeError, match="--compile-reward: red has no image tower"):
        compile_image_tower("red", toy_world.LikesRed())


def test_a_run_compiles_what_its_recipe_names(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, RUNS[0], compile=True)
    assert all(block._compiled_call_impl for block in exact_world(recipe).pipe.transformer.transformer_blocks)


def compile_trial_of(recipe: Any, world: Any, iterations: int) -> tuple[compile_trial.CompileTrial, str, bool]:
    """The trial, the line that it says, and whether the blocks are compiled after it."""
    lines = list[str]()
    trial = compile_trial.choose(recipe, world, iterations, lines.append)
    blocks = world.pipe.transformer.transformer_blocks
    return trial, lines[0], all(block._compiled_call_impl is not None for block in blocks)


def slow_unless_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make eager blocks slower than compiled ones, as a GPU's are."""
    forward = FluxTransformerBlock.forward

    def slow(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            time.sleep(0.03)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FluxTransformerBlock, "forward", slow)


def test_the_trial_keeps_compiled_blocks_that_are_faster_and_a_resumed_run_takes_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_unless_compiled(monkeypatch)
    recipe = toy_world.recipe(tmp_path)
    trial, line, compiled = compile_trial_of(recipe, toy_world.world(recipe), 10**6)
    assert trial.compiled
    assert compiled
    assert line.startswith("compiled blocks: ")
    assert trial.compiled_seconds is not None
    assert trial.eager_seconds - trial.compiled_seconds >= 0.03 * (recipe.rollout.steps - 1)  # a plan has two calls
    world, before = toy_world.world(recipe), graphs()
    assert compile_trial_of(recipe, world, 1) == (trial, line, True)
    assert graphs() == before  # no second trial
    discard(tmp_path)
    assert not compile_trial_of(recipe, world, 1)[0].compiled


def test_the_trial_returns_to_eager_blocks_that_are_no_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_trial, "GAIN", 0.2)  # nothing here is five times as fast
    recipe = toy_world.recipe(tmp_path)
    world = toy_world.world(recipe)
    trial, line, compiled = compile_trial_of(recipe, world, 10**6)
    assert graphs()
    assert not trial.compiled
    assert not compiled
    assert "no faster" in line
    assert all(parameter.grad is None for parameter in world.module.parameters())


def test_a_short_run_and_a_failing_compiler_stay_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_world.recipe(tmp_path)
    assert compile_trial_of(recipe, toy_world.world(recipe), 6)[1:] == ("eager blocks: the run is short", False)
    assert not graphs()
    discard(tmp_path)

    def refuse(*_: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compilation, "BACKEND", refuse)
    trial, line, compiled = compile_trial_of(recipe, toy_world.world(recipe), 10**6)
    assert not trial.compiled
    assert not compiled
    assert "compiling failed" in line


def test_the_trial_is_for_a_gpu(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    assert not compile_trial.applies(recipe, toy_world.world(recipe))
