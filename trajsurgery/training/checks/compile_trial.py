"""Whether compiled blocks pay within a run: model calls are timed with and without, before the run begins."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

from trajsurgery.training.checkpoints.checkpoint import COMPILED
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.checks.trial import STEPS, gradient_is_finite, trial_call
from trajsurgery.training.components import RunComponents
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.model.compilation import compile_blocks, run_eagerly
from trajsurgery.training.recipe import Recipe

LONG = 600.0
"""Seconds of model calls in a run from which a trial is made: compiling Flux takes half a minute."""

GAIN = 0.97
"""Compiled calls are kept if they take at most this share of the eager ones' time."""

REPETITIONS = 3


@dataclass(frozen=True)
class CompileTrial:
    """compiled.json in the output folder. A run that goes on takes this choice again."""

    compiled: bool
    eager_seconds: float
    """Of an iteration's model calls, on one rank."""
    compiled_seconds: float | None
    """None: not tried, or it failed."""
    trial_seconds: float
    """What compiling and measuring took."""
    reason: str


def applies(recipe: Recipe, world: RunComponents) -> bool:
    """Whether the choice is left to a trial: on a GPU, where no other rank holds a shard."""
    rollout, on_gpu = recipe.rollout, world.device.type == "cuda"
    return rollout.compile_trial and not rollout.compile and on_gpu and not sharding.is_sharded(world.module)


def choose(recipe: Recipe, world: RunComponents, iterations: int, tell: Callable[[str], None]) -> CompileTrial:
    """Compile the transformer's blocks if that is faster, or as the run's first start did. All ranks choose alike.

    Args:
        iterations: how many are left.
        tell: shows a line to the user.
    """
    path, trial = recipe.output / COMPILED, None
    if path.exists():
        trial = CompileTrial(**json.loads(path.read_text()))
        if trial.compiled:
            compile_blocks(world.module)
    ranks.wait_for_all()  # all have seen whether there is one
    if trial is None:
        trial = _trial(recipe, world, iterations)
        write_atomically(path, lambda partial: partial.write_text(json.dumps(asdict(trial), indent=1) + "\n"))
    tell(trial.reason)
    return trial


def _trial(recipe: Recipe, world: RunComponents, iterations: int) -> CompileTrial:
    began = time.monotonic()
    eager = max(ranks.gathered(_iteration_seconds(recipe, world)))
    if eager * iterations < LONG:
        return CompileTrial(False, eager, None, time.monotonic() - began, "eager blocks: the run is short")
    try:
        compile_blocks(world.module)
        compiled, reason = _iteration_seconds(recipe, world), ""
    except Exception as error:  # whatever a compiler raises: the run goes on without it
        compiled, reason = math.inf, f"compiling failed: {str(error).strip().splitlines()[0]}"
    compiled, taken = max(ranks.gathered(compiled)), time.monotonic() - began
    figures = f"{compiled:.2f} s of model calls an iteration instead of {eager:.2f}, {taken:.0f} s for the trial"
    if compiled <= GAIN * eager:
        return CompileTrial(True, eager, compiled, taken, f"compiled blocks: {figures}")
    run_eagerly(world.module)
    if compiled == math.inf:
        return CompileTrial(False, eager, None, taken, f"eager blocks: {reason or 'compiling failed on another rank'}")
    return CompileTrial(False, eager, compiled, taken, f"eager blocks: compiled ones are no faster ({figures})")


def _iteration_seconds(recipe: Recipe, world: RunComponents) -> float:
    """Return what the model calls of an iteration take on this rank, by calls of the recipe's own size.

    A call of two steps without gradient gives the time of one step; one of which the second step has a backward pass
    gives the time of such a step. The first of each, which may compile, is not counted.
    """

    def plain() -> None:
        with torch.no_grad():
            world.pipe(**trial_call(recipe, world))

    step = _seconds(plain) / STEPS
    trained_step = _seconds(lambda: gradient_is_finite(recipe, world)) - (STEPS - 1) * step
    plan = recipe.method.draw(recipe.rollout.steps, torch.Generator().manual_seed(recipe.seed))
    calls = recipe.rollout.plans * plan.cost(recipe.rollout.steps).calls
    rows = len(ranks.rows(recipe.rollout.batch))
    rollouts = math.ceil(rows / min(recipe.rollout.at_once or rows, rows))
    return rollouts * (max(0, recipe.rollout.steps - calls) * step + calls * trained_step)


def _seconds(run: Callable[[], object]) -> float:
    """Return the median time of a run, after one that is not counted."""
    run()
    times = list[float]()
    for _ in range(REPETITIONS):
        began = time.monotonic()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return median(times)
