"""Iterations of the embedded Flux on several processes of this machine (gloo), for scaling_out.py, which starts them.

torchrun --nproc_per_node 2 -m benchmarks.engine.scaling_out_measured --file two.json
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from trajsurgery import LeapAlign
from trajsurgery.training import components
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.distributed import ranks
from trajsurgery.training.presets import presets
from trajsurgery.training.training_loop import StepRecord, iteration_generator, train

WAYS = {"ddp": ("ddp", "iteration"), "fsdp, iteration": ("fsdp", "iteration"), "fsdp, layer": ("fsdp", "layer")}
ALONE = {"one process": ("none", "iteration")}
WARM_UP = 1


@dataclass(frozen=True)
class Options:
    """What each process measures."""

    file: Path
    """Where the first process writes."""
    iterations: int = 7
    batch: int = 16
    """Images an iteration of strong scaling, on all processes together."""
    share: int = 8
    """Images an iteration of weak scaling, on each process."""


def measure(way: tuple[str, str], batch: int, iterations: int) -> dict[str, Any]:
    """Run the training loop; return wall seconds (the slowest process's) and processor seconds (all) an iteration."""
    base: Any = presets(LeapAlign(alpha=0.3), "")["tiny"]
    shard, gather = way
    recipe: Any = replace(base, rollout=replace(base.rollout, batch=batch), shard=shard, gather=gather, device="cpu")
    wall, processor = list[float](), [0.0]

    def watch(record: StepRecord) -> None:
        wall.append(record.seconds)
        processor.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe, iterations=iterations + WARM_UP, output=Path(folder))
        world, numbers = components.load(recipe), range(1, recipe.iterations + 1)
        draws = (iteration_generator(recipe.seed, number, "prompts") for number in numbers)
        components.encode_prompts(recipe, world, (), draws)
        train(recipe, world, TrainingState.start(recipe, world.module), watch)
    slowest = [max(seconds) for seconds in zip(*ranks.gathered(wall), strict=True)]
    work = [b - a for a, b in itertools.pairwise(processor)]
    together = [sum(seconds) for seconds in zip(*ranks.gathered(work), strict=True)]
    return {"batch": batch, "seconds": summary(slowest[WARM_UP:]), "processor_seconds": summary(together[WARM_UP:])}


def summary(values: list[float]) -> dict[str, Any]:
    """Return median and quartiles."""
    return {"median": statistics.median(values), "quartiles": statistics.quantiles(values, n=4)[::2]}


def main(options: Options) -> None:
    """Measure each way, with a batch of fixed size and one that grows with the processes."""
    torch.set_num_threads(1)
    ranks.join(torch.device("cpu"))
    count, rows = ranks.count(), list[dict[str, Any]]()
    for (name, way), scaling in itertools.product((WAYS if count > 1 else ALONE).items(), ("strong", "weak")):
        batch = options.batch if scaling == "strong" else options.share * count
        row = measure(way, batch, options.iterations)
        rows.append({"processes": count, "threads": 1, "way": name, "scaling": scaling, **row})
    if ranks.is_main():
        options.file.write_text(json.dumps(rows))
    ranks.leave()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
