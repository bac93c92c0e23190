"""FSDP under --gather: how often an iteration gathers weights and reduces gradients, and in which dtype it adds up."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.engine.scaling_out_predicted import collectives
from tests.builders import toy_world
from tests.builders.problems import distance
from tests.training.test_ranks import exact_world, first_gradient, recipe_of, spawn
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache
from trajsurgery.training.distributed import ranks
from trajsurgery.training.training_loop import training_step

GROUPS = 3
"""Of the toy transformer under FSDP: two blocks, and what is outside them."""
STEPS, CALLS, ROLLOUTS = 5, 2, 2
"""The sampler's steps, LeapAlign's calls with gradient, and rollouts a rank."""
MEMORY = ("retain", "staged", "split")
WAYS = {"iteration": "fsdp", "layer": "fsdp by layer"}


class CountedCollectives(TorchDispatchMode):
    """Counts the collectives of FSDP: all-gathers of weights, reduce-scatters of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            self.counts["gather" if "allgather" in name else "reduce" if "reduce_scatter" in name else name] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(folder: Path) -> None:
    """Write the counts of the second iteration, in which FSDP's first-time set-up is over."""
    counts: dict[str, Counter[str]] = {}
    for memory, gather in itertools.product(MEMORY, WAYS):
        recipe = recipe_of(folder, ("leapalign", memory, False), WAYS[gather], at_once=1)
        assert (recipe.rollout.steps, recipe.rollout.batch) == (STEPS, ROLLOUTS * ranks.count())
        world = exact_world(recipe)
        training, cache = TrainingState.start(recipe, world.module), PromptCache(world.pipe, world.texts)
        training_step(recipe, world, cache, training, 0.9)
        with CountedCollectives() as collectives:
            training_step(recipe, world, cache, training, 0.9)
        counts[f"{memory} {gather}"] = collectives.counts
    if ranks.is_main():
        (folder / "counts").write_text(json.dumps(counts))


def test_an_iteration_gathers_and_reduces_once_and_by_layer_each_call(tmp_path: Path) -> None:
    """As benchmarks/engine/scaling_out.py predicts."""
    spawn(2, count_collectives, tmp_path)
    counts = json.loads((tmp_path / "counts").read_text())
    for memory, gather in itertools.product(MEMORY, WAYS):
        measured = counts[f"{memory} {gather}"]
        gathers, reductions = collectives(memory, gather, STEPS, CALLS, ROLLOUTS)
        assert (measured["gather"], measured["reduce"]) == (GROUPS * gathers, GROUPS * reductions), (memory, gather)
        assert (gathers, reductions) == (1, 1) or gather == "layer"


def compare_in_bfloat16(folder: Path) -> None:
    """Write the relative distances between the gradients of both ways, and between bfloat16 and float32."""
    gradients: dict[str, Any] = {}
    for precision, gather in itertools.product(("bfloat16", "float32"), WAYS):
        recipe = recipe_of(folder, ("leapalign", "staged", False), WAYS[gather], precision=precision)
        gradients[f"{precision} {gather}"] = first_gradient(recipe, toy_world.world(recipe))[1]
    one, other = gradients["bfloat16 iteration"], gradients["bfloat16 layer"]
    if ranks.is_main():
        distances = distance(one, other), distance(one, gradients["float32 iteration"])
        (folder / "distances").write_text(json.dumps(distances))


def test_gradients_of_bfloat16_calls_are_added_up_in_float32(tmp_path: Path) -> None:
    spawn(2, compare_in_bfloat16, tmp_path)
    between_ways, rounding = json.loads((tmp_path / "distances").read_text())
    assert between_ways < 1e-6 < 1e-3 < rounding
