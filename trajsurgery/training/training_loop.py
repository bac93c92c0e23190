"""The training loop, the same for every method: sample, score, backpropagate along the plan, step the optimizer."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType

import torch

from trajsurgery.errors import RecipeError
from trajsurgery.plans.nodes import Velocity
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.deferred_checks import deferred_checks
from trajsurgery.training import endings
from trajsurgery.training.averages import update_averages
from trajsurgery.training.checkpoints.checkpoint import save
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache, RunComponents, draw_batch_prompts, hinge_threshold
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.faults import missing_gradients
from trajsurgery.training.faults.bad_numbers import name_bad_numbers
from trajsurgery.training.iteration_parts import PartTimes, part, part_times, peak_memory
from trajsurgery.training.optimisers import set_rate, step
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.step_gradient import (
    RolloutInputs,
    add_gradient,
    add_shared_gradient,
    draw_plans,
    plan_of_samples,
    times_of_plans,
)
from trajsurgery.training.step_record import StepRecord

PATIENCE = 3
"""So many iterations in a row without a finite gradient stop the run."""

FIGURES = 7
"""What a rollout's gradient says of it (step_gradient.add_gradient)."""

_PURPOSES = ("plan", "prompts", "noise", "renoise")


def iteration_generator(seed: int, iteration: int, purpose: str) -> torch.Generator:
    """Return the generator of one iteration and purpose. Its state is never saved."""
    number = (seed * 1_000_003 + iteration) * len(_PURPOSES) + _PURPOSES.index(purpose)
    return torch.Generator().manual_seed(number)


def sample_generators(generator: torch.Generator, batch: int) -> list[torch.Generator]:
    """Return a generator for each sample, so that its noise is the same on any rank and in any rollout of the batch."""
    seeds: list[int] = torch.randint(2**63 - 1, (batch,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def as_argument(generators: list[torch.Generator]) -> torch.Generator | list[torch.Generator]:
    """Return a pipeline's `generator`. A single one is no list: some pipelines (Wan VACE) take none."""
    return generators[0] if len(generators) == 1 else generators


def train(
    recipe: Recipe,
    world: RunComponents,
    training: TrainingState,
    watch: Callable[[StepRecord], None],
    validate: Callable[[], bool] = lambda: True,
) -> bool:
    """Run the remaining iterations; return whether the run is complete, as `iterate` does.

    Args:
        watch: called with each iteration's record.
    """
    steps = iterate(recipe, world, training, validate)
    while True:
        try:
            watch(next(steps))
        except StopIteration as end:
            return end.value


def iterate(
    recipe: Recipe, world: RunComponents, training: TrainingState, validate: Callable[[], bool] = lambda: True
) -> Generator[StepRecord, None, bool]:
    """Run the remaining iterations; yield each one's record, once it is in the log and its checkpoint is written.

    Closing the generator before its end saves the run. Ctrl-C and SIGTERM end it after the current iteration, also
    while the caller works on a record.

    Args:
        validate: called before each iteration; False stops the run early.

    Returns:
        Whether the run is complete (False: interrupted, and saved).

    Raises:
        DivergedError: three iterations in a row had no finite loss and gradient.
        RecipeError: the run is complete, and nothing was trained.
    """
    record: StepRecord | None = None
    training.started = training.started or training.fingerprint()
    embeddings = PromptCache(world.pipe, ())  # filled by components.encode_prompts, or at first use
    lambda_, log = hinge_threshold(recipe, world), Log(recipe.output / METRICS)
    with catch_interruptions() as signals:
        while not ranks.any_rank(bool(signals)) and validate() and training.iteration < recipe.iterations:
            began = time.monotonic()
            record = training_step(recipe, world, embeddings, training, lambda_)
            training.seconds += time.monotonic() - began
            figures = record.loss, record.grad_norm, record.weight, record.closed
            training.loss_range.update(record.iteration, *figures)
            log.append(asdict(record))
            if training.in_a_row < PATIENCE and training.iteration % recipe.save_every == 0 and training.finite:
                save(recipe, training)
            try:
                yield record
            except GeneratorExit:
                if training.saved != training.position and training.finite:
                    save(recipe, training)
                raise
            if training.in_a_row >= PATIENCE:
                endings.give_up(recipe, training, record.bad)
        if not training.finite:
            endings.give_up(recipe, training, record.bad if record else ())
        if training.saved != training.position:
            save(recipe, training)
        interrupted = ranks.any_rank(bool(signals))
    ended = training.iteration >= recipe.iterations or training.early_stopping.stops(recipe.guards.patience)
    if ended and record:
        endings.check_something_trained(recipe, training, record.bad)
    return ended and not interrupted


def training_step(
    recipe: Recipe, world: RunComponents, embeddings: PromptCache, training: TrainingState, lambda_: float
) -> StepRecord:
    """Run one iteration: draw plans, sample the batch in one or more rollouts, step the optimizer once."""
    with part_times(world.device) as times:
        return _training_step(recipe, world, embeddings, training, lambda_, times)


def _training_step(
    recipe: Recipe,
    world: RunComponents,
    embeddings: PromptCache,
    training: TrainingState,
    lambda_: float,
    times: PartTimes,
) -> StepRecord:
    began, number = time.monotonic(), training.iteration + 1
    draws = {purpose: iteration_generator(recipe.seed, number, purpose) for purpose in _PURPOSES}
    plans = draw_plans(recipe, draws["plan"])
    texts = draw_batch_prompts(recipe, world, draws["prompts"])
    noise, renoise = sample_generators(draws["noise"], len(texts)), sample_generators(draws["renoise"], len(texts))
    seed = int(torch.randint(2**62, (), generator=draws["renoise"]))
    rows = ranks.rows(len(texts))
    at_once = min(recipe.rollout.at_once or len(rows), len(rows))
    sums = torch.zeros(FIGURES + len(texts), device=world.device)  # the figures, and a place for each sample
    anchor, keep = training.anchor, None if training.anchor else times_of_plans(plans)
    add_anchor = anchor and (
        lambda surgery, share: anchor.add_gradient(surgery.field, surgery.trajectory, number, share)
    )
    with missing_gradients.clear_untouched_gradients(training.parameters), deferred_checks() as checks:
        for start in rows[::at_once]:
            end = min(start + at_once, rows.stop)
            chosen = texts[start:end]
            arguments = {**embeddings(chosen), "generator": as_argument(noise[start:end])}
            inputs = RolloutInputs(chosen, arguments, renoise[start:end], seed, len(chosen) / len(texts), keep)
            part_plans = [plan_of_samples(plan, start, end) for plan in plans]
            sharding.reduce_in(world.module, last=end == rows.stop)
            if len(part_plans) == 1:
                figures, bad = add_gradient(recipe, world, part_plans[0], inputs, lambda_, add_anchor)
            else:
                figures, bad = add_shared_gradient(recipe, world, part_plans, inputs, lambda_, add_anchor)
            sums[:FIGURES] += figures * inputs.share
            sums[FIGURES + start : FIGURES + end] = bad
    sharding.reduce_gradients(world.module, recipe.gather)
    sharding.release(world.module)
    sharding.reduce_copies(training.parameters)
    if all(p.grad is None for p in training.parameters):
        raise RecipeError(_NOTHING)
    norm = sharding.whole(torch.nn.utils.clip_grad_norm_(training.parameters, recipe.optimiser.clip))
    sums = ranks.total(sums)
    on_device = (norm.reshape(1).to(sums), sums, checks.flags(sums))
    grad_norm, *numbers = torch.cat(on_device).tolist()  # the iteration's one wait for the device
    checks.raise_failed(numbers[len(sums) :])
    times.read_device()
    reward, loss, clamped, weight, closed, distance, anchor_figure = numbers[:FIGURES]
    places = [int(place) for place in numbers[FIGURES : len(sums)]]
    checked = {"the loss": loss, "the anchor's gradient": anchor_figure, "the transformer's gradient": grad_norm}
    is_finite = {name: math.isfinite(value) for name, value in checked.items()}
    seeds = [generator.initial_seed() for generator in noise]
    bad_numbers = name_bad_numbers(places, is_finite, texts, seeds)
    idle = _idle(training) if not bad_numbers and loss > 0 and not training.looked else None
    with part("the optimiser's step"):
        skipped = _step(recipe, training, not bad_numbers)
    training.steps += not skipped and grad_norm > 0
    return StepRecord(
        number,
        reward,
        loss,
        grad_norm,
        clamped,
        weight,
        closed,
        skipped,
        called_times(plans),
        round(time.monotonic() - began, 4),
        idle,
        bad_numbers,
        anchor_figure if anchor else None,
        distance,
        {name: round(seconds, 4) for name, seconds in times.seconds.items()},
        round(peak_memory(world.device), 3),
    )


def called_times(plans: Sequence[Plan | PerSample]) -> tuple[int, ...]:
    """Return the times of the plans' model calls, noise first."""
    nodes = {node for plan in plans for node in plan.nodes}
    return tuple(sorted({n.t for n in nodes if isinstance(n, Velocity) and isinstance(n.t, int)}, reverse=True))


_NOTHING = "no parameter of the transformer received a gradient: something between it and the reward detaches."


def _idle(training: TrainingState) -> tuple[str, ...]:
    """Return the parameters without gradient, once in a run. Waits for the device. A hinge closed for all images is
    skipped.

    Raises:
        RecipeError: none of them has a gradient.
    """
    names = tuple(missing_gradients.without_gradient(training.module.named_parameters()))
    if len(names) == len(training.parameters):
        raise RecipeError(_NOTHING)
    training.looked = True
    return names


def _step(recipe: Recipe, training: TrainingState, healthy: bool) -> bool:
    """Step optimizer and EMA unless loss or gradient are not finite; return whether the step was skipped."""
    if healthy:
        set_rate(training.optimiser, recipe.optimiser, training.iteration + 1)
        step(training.optimiser, recipe.seed * 1_000_003 + training.iteration + 1)
        update_averages(training.ema, training.local)
    # These add into gradients that exist, and never hold a second one.
    # Shards get a new gradient from FSDP each time.
    adds = recipe.rollout.memory in ("staged", "split") and not sharding.is_sharded(training.module)
    training.optimiser.zero_grad(set_to_none=not adds)
    training.iteration += 1
    training.skipped += not healthy
    training.in_a_row = 0 if healthy else training.in_a_row + 1
    return not healthy


@contextmanager
def catch_interruptions() -> Generator[list[int]]:
    """Record Ctrl-C and SIGTERM, so that the current iteration ends and is saved; a second one interrupts."""
    signals: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    try:
        before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever started it handles signals
        before = {}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
