"""Several ranks train as one process does: the same figures, gradients and weights, under FSDP2, HSDP and copies."""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.builders import toy_world
from tests.builders.problems import distance
from tests.builders.processes import spawn_ranks
from tests.builders.saved_runs import load_checkpoint
from trajsurgery import DRaFTLV, DRTune, FlowBPLagrange, LeapAlign, RecipeError
from trajsurgery.cli import train_command
from trajsurgery.training.checkpoints.run_log import METRICS
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache, RunComponents, prepare_pipeline
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.settings import Decoder, Guards, Optimiser, Trained
from trajsurgery.training.training_loop import training_step

METHODS: dict[str, Method] = {
    "leapalign": LeapAlign(),
    "drtune": DRTune(last=3),
    "draft_lv": DRaFTLV(n=2),
    "lagrange": FlowBPLagrange(),
}
WAYS = {"ddp": ("ddp", "iteration"), "fsdp": ("fsdp", "iteration"), "fsdp by layer": ("fsdp", "layer")}
RUNS = (*itertools.product(METHODS, ("retain", "staged", "split"), (False, True)), ("leapalign", "split", "lora"))
HYBRID = (("leapalign", "split", False), ("drtune", "staged", True))


def exact_world(recipe: Recipe) -> RunComponents:
    """The toy world in float64."""
    pipe = toy_world.pipeline()
    pipe.transformer.double()
    pipe = prepare_pipeline(pipe, replace(recipe, decoder=Decoder(stay=True)))
    nn.Module.to(pipe.vae, torch.float64)
    for parameter in pipe.transformer.parameters():
        if parameter.dtype == torch.float32:  # adapters
            parameter.data = parameter.data.double()
    return toy_world.components(pipe)


def recipe_of(output: Path, run: tuple[str, str, Any], way: str = "ddp", **rollout: Any) -> Recipe:
    method, memory, extra = run
    recipe = toy_world.recipe(output, METHODS[method], optimiser=Optimiser(rate=1e-9, clip=1e9))
    options = {"memory": memory, "checkpointing": extra is True, **rollout}
    trained = Trained("lora", rank=2) if extra == "lora" else Trained()
    shard, gather = WAYS[way]
    return replace(recipe, rollout=replace(recipe.rollout, **options), train=trained, shard=shard, gather=gather)


def first_gradient(recipe: Recipe, world: RunComponents | None = None) -> tuple[list[float], list[Tensor]]:
    """Figures and the whole gradient of the first iteration."""
    world = world or exact_world(recipe)
    training, gradients = TrainingState.start(recipe, world.module), list[Tensor]()
    training.optimiser.step = lambda: gradients.extend(sharding.whole(p.grad).clone() for p in training.parameters)
    record = training_step(recipe, world, PromptCache(world.pipe, world.texts), training, 0.9)
    return [record.reward, record.loss, record.grad_norm], gradients


def compare_gradients(folder: Path, runs: Any, ways: Any) -> dict[str, Any]:
    """The relative errors of gradient and figures against one process on the joined batch."""
    errors: dict[str, Any] = {}
    for run in runs:
        figures, expected = torch.load(folder / f"{run}.pt")
        for way, at_once in itertools.product(ways, (None, 1) if run[1] == "split" else (None,)):
            mine, gradients = first_gradient(recipe_of(folder, run, way, at_once=at_once))
            gap = max(abs(a - b) / (1e-3 + abs(b)) for a, b in zip(mine, figures, strict=True))
            errors[f"{run} {way} {at_once}"] = distance(gradients, expected), gap
    return errors


def run_whole(folder: Path, way: str, iterations: int, world: Any = None, **changes: Any) -> None:
    """A whole run, from the first evaluation to the pictures."""
    recipe = toy_world.recipe(folder, iterations=iterations, save_every=5, optimiser=Optimiser(rate=3e-3), **changes)
    recipe = replace(recipe, shard=WAYS[way][0], gather=WAYS[way][1])
    train_command.main(recipe, (world or exact_world)(recipe))


def spawn(count: int, work: Callable[..., Any], *args: Any, per_node: int | None = None) -> None:
    """Run `work(*args)` on some ranks of this machine, started as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn_ranks(_rank, (count, per_node or count, port, work, args), count)


def _rank(rank: int, count: int, per_node: int, port: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    places = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node}
    os.environ.update({name: str(n) for name, n in places.items()}, MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    ranks.join(torch.device("cpu"))
    work(*args)
    ranks.leave()
    os._exit(0)  # gloo's threads sometimes abort a process that ends otherwise, after all was checked


def write_errors(folder: Path, name: str, runs: Any, ways: Any) -> None:
    errors = compare_gradients(folder, runs, ways)
    if ranks.is_main():
        (folder / name).write_text(json.dumps(errors))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gradients of one process."""
    folder = tmp_path_factory.mktemp("gradients")
    for run in RUNS:
        torch.save(first_gradient(recipe_of(folder, run)), folder / f"{run}.pt")
    return folder


def check(errors: dict[str, Any], count: int) -> None:
    assert len(errors) == count
    assert any(figures > 0 for _, figures in errors.values())  # they are not of one process
    for name, (gradient, figures) in errors.items():
        assert gradient < 1e-10, name
        assert figures < 1e-5, name  # they are float32


def test_two_ranks_have_the_gradient_of_one_process(expected: Path) -> None:
    spawn(2, write_errors, expected, "two", RUNS, WAYS)
    check(json.loads((expected / "two").read_text()), (len(RUNS) + sum(run[1] == "split" for run in RUNS)) * len(WAYS))


def test_two_nodes_of_two_ranks_have_the_gradient_of_one_process(expected: Path) -> None:
    spawn(4, write_errors, expected, "four", HYBRID, WAYS, per_node=2)
    check(json.loads((expected / "four").read_text()), 9)


def result(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return lines, load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def check_same_run(one: Path, other: Path) -> None:
    """Figures, final evaluation and weights agree to the rounding of float64 in the model and float32 in figures."""
    (lines, weights), (others, other_weights) = result(one), result(other)
    assert [line["kind"] for line in lines] == [line["kind"] for line in others]
    for a, b in zip(lines[:-1], others[:-1], strict=True):
        names = ("reward", "loss", "grad_norm") if a["kind"] == "iteration" else ("reward",)
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-5)
    assert lines[-1]["reward_after"] == pytest.approx(others[-1]["reward_after"], rel=1e-5)
    assert weights.keys() == other_weights.keys()
    assert distance(list(other_weights.values()), list(weights.values())) < 1e-8


def several_runs(folder: Path) -> None:
    for way in WAYS:
        run_whole(folder / way, way, 20)
    run_whole(folder / "fewer", "fsdp", 10)
    run_whole(folder / "guarded", "fsdp", 8, guarded_world, **GUARDED)


GUARDED: dict[str, Any] = {"guards": Guards(every=2, images=6, patience=9, anchor=0.5)}


def guarded_world(recipe: Recipe) -> RunComponents:
    metrics = {"green": lambda images, prompts: images[:, 1].mean((1, 2))}
    return replace(exact_world(recipe), validation=toy_world.PROMPTS, metrics=metrics)


def test_two_ranks_run_as_one_process_does_and_go_on_on_another_number(tmp_path: Path) -> None:
    run_whole(tmp_path / "one", "ddp", 20)
    run_whole(tmp_path / "guarded by one", "ddp", 8, guarded_world, **GUARDED)
    spawn(2, several_runs, tmp_path)
    for way in WAYS:
        check_same_run(tmp_path / "one", tmp_path / way)
        assert (tmp_path / way / "samples.png").is_file()
    check_same_run(tmp_path / "guarded by one", tmp_path / "guarded")
    assert load_checkpoint(tmp_path / "fewer")["iteration"] == 10
    run_whole(tmp_path / "fewer", "ddp", 20)
    check_same_run(tmp_path / "one", tmp_path / "fewer")


def refused(folder: Path) -> None:
    recipe = toy_world.recipe(folder)
    odd, world = replace(recipe, rollout=replace(recipe.rollout, batch=3)), toy_world.world(recipe)
    with pytest.raises(RecipeError, match=r"--rollout\.batch 3 can't be divided among 2"):
        train_command.main(odd, world)
    with pytest.raises(RecipeError, match="--shard none, and 2 processes"):
        toy_world.world(replace(recipe, shard="none"))


def test_what_ranks_can_not_share_is_refused(tmp_path: Path) -> None:
    spawn(2, refused, tmp_path)
