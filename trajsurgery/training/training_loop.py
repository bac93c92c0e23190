"""The one training loop, for every method: sample, grade, pull the gradient along the plan, step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Literal

import torch

from trajsurgery.errors import DivergedError, RecipeError
from trajsurgery.plans.nodes import Velocity
from trajsurgery.training import missing_gradients
from trajsurgery.training.checkpoint import METRICS, Log, Training, save
from trajsurgery.training.components import Embeddings, RunComponents, texts_of, threshold
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.step_gradient import draw_plans, part_of, pull, pull_several

PATIENCE = 3
"""So many iterations in a row without a finite gradient stop the run."""

_PURPOSES = ("plan", "prompts", "noise", "renoise")


@dataclass(frozen=True)
class Iteration:
    """One line of metrics.jsonl. Means are over the batch."""

    kind: Literal["iteration"] = field(default="iteration", kw_only=True)
    iteration: int
    """From 1."""
    reward: float
    """Of the generated images x_0, whatever the plan's output is."""
    loss: float
    grad_norm: float
    """Before clipping."""
    clamped: float
    """The share of distances that tau replaced; tau is too large if it is near 1: no weighting is left."""
    weight: float
    closed: float
    """The share of scores at or above lambda, which give no gradient."""
    skipped: bool
    """Whether loss or gradient were not finite, so that nothing changed."""
    times: tuple[int, ...]
    """The times at which the plan called the model with gradient."""
    seconds: float
    idle: tuple[str, ...] | None = None
    """Parameters that train and got no gradient (alarm.py); looked at once, in the first iteration that teaches."""
    anchor: float | None = None
    """mean (v - v_base)^2 at a drawn time (anchor.py), where there is an anchor. It is not in `loss`."""


def generator(seed: int, iteration: int, purpose: str) -> torch.Generator:
    """The draws of one iteration: no state is carried from one to the next, so that none has to be saved."""
    number = (seed * 1_000_003 + iteration) * len(_PURPOSES) + _PURPOSES.index(purpose)
    return torch.Generator().manual_seed(number)


def train(
    recipe: Recipe,
    world: RunComponents,
    training: Training,
    watch: Callable[[Iteration], None],
    validate: Callable[[], bool] = lambda: True,
) -> bool:
    """Runs the iterations that are left; says whether it is done (False: interrupted, and saved).

    Args:
        watch: called with each iteration's record, once it is in the log.
        validate: called before each iteration; False stops the run early.

    Raises:
        DivergedError: three iterations in a row had no finite loss and gradient.
    """
    embeddings = Embeddings(world.pipe, ())  # made ahead (world.encode), or when they are asked for
    lambda_, log = threshold(recipe, world), Log(recipe.output / METRICS)
    with interruptions() as asked:
        while not asked and validate() and training.iteration < recipe.iterations:
            began = time.monotonic()
            record = iterate(recipe, world, embeddings, training, lambda_)
            training.seconds += time.monotonic() - began
            log.append(asdict(record))
            watch(record)
            if training.in_a_row >= PATIENCE:
                _give_up(recipe, training)
            if training.iteration % recipe.save_every == 0 and training.finite:
                save(recipe, training)
        if not training.finite:
            _give_up(recipe, training)
        save(recipe, training)
    return training.iteration >= recipe.iterations or training.early_stopping.stops(recipe.guards.patience)


def iterate(
    recipe: Recipe, world: RunComponents, embeddings: Embeddings, training: Training, lambda_: float
) -> Iteration:
    """One iteration: one plan or several, a batch in one or more rollouts, one step of the optimiser."""
    began, number = time.monotonic(), training.iteration + 1
    draws = {purpose: generator(recipe.seed, number, purpose) for purpose in _PURPOSES}
    plans = draw_plans(recipe, draws["plan"])
    texts = texts_of(recipe, world, draws["prompts"])
    at_once = recipe.rollout.at_once or len(texts)
    sums = torch.zeros(7, device=world.device)
    anchor = training.anchor
    hold = anchor and (lambda surgery, share: anchor.pull(surgery.field, surgery.trajectory, number, share))
    with missing_gradients.untouched_is_none(training.parameters):
        for start in range(0, len(texts), at_once):
            part = texts[start : start + at_once]
            kwargs = {**embeddings(part), "generator": draws["noise"]}
            scale = lambda_, len(part) / len(texts)
            own = [part_of(plan, start, start + at_once) for plan in plans]
            if len(own) == 1:
                grades = pull(recipe, world, own[0], part, kwargs, draws["renoise"], scale, hold)
            else:
                grades = pull_several(recipe, world, own, part, kwargs, draws["renoise"], scale, hold)
            sums += grades * (len(part) / len(texts))
    if all(p.grad is None for p in training.parameters):
        raise RecipeError(_NOTHING)
    norm = torch.nn.utils.clip_grad_norm_(training.parameters, recipe.optimiser.clip)
    found = torch.cat([sums, norm.reshape(1).to(sums)]).tolist()  # the iteration's one wait for the device
    reward, loss, clamped, weight, closed, _, held, grad_norm = found
    healthy = bool(torch.tensor(found).isfinite().all())
    idle = _idle(training) if healthy and loss > 0 and not training.looked else None
    skipped = _step(recipe, training, healthy)
    nodes = {n for plan in plans for n in plan.nodes}
    times = sorted({n.t for n in nodes if isinstance(n, Velocity) and isinstance(n.t, int)}, reverse=True)
    seconds = round(time.monotonic() - began, 4)
    figures = reward, loss, grad_norm, clamped, weight, closed
    return Iteration(number, *figures, skipped, tuple(times), seconds, idle, held if anchor else None)


_NOTHING = "no parameter of the transformer received a gradient: something between it and the reward detaches."


def _idle(training: Training) -> tuple[str, ...]:
    """Look once in a run for missing gradients (it waits for the device); a hinge closed for all images says nothing.

    Raises:
        RecipeError: all are idle.
    """
    names = tuple(missing_gradients.idle(training.module.named_parameters()))
    if len(names) == len(training.parameters):
        raise RecipeError(_NOTHING)
    training.looked = True
    return names


def _step(recipe: Recipe, training: Training, healthy: bool) -> bool:
    """The optimiser's step, unless loss or gradient are not finite; says whether it was left out."""
    if healthy:
        training.optimiser.step()
        training.ema.step(training.parameters)
    # The staged sweep adds into gradients that exist: it never holds a second one.
    training.optimiser.zero_grad(set_to_none=recipe.rollout.memory != "staged")
    training.iteration += 1
    training.skipped += not healthy
    training.in_a_row = 0 if healthy else training.in_a_row + 1
    return not healthy


def _give_up(recipe: Recipe, training: Training) -> None:
    """Stops the run; the last good weights are in the checkpoint."""
    good = training.finite
    if good:
        save(recipe, training)
    kept = "its weights are good and saved" if good else "its weights are spoilt; the last good ones are saved"
    raise DivergedError(
        f"the run stopped at iteration {training.iteration}: {training.in_a_row} in a row had a loss or gradient that "
        f"is not finite ({training.skipped} in all), and {kept} in {recipe.output}. Lower --optimiser.rate, or raise "
        "--rollout.precision to float32, and start anew with --overwrite or another --output."
    )


@contextmanager
def interruptions() -> Generator[list[int]]:
    """Ctrl-C and SIGTERM are noted, so that the iteration under way is finished and saved; a second one interrupts."""
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever started it handles signals
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
