"""The one training loop, for every method: sample, grade, pull the gradient along the plan, step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from trajsurgery import alarm, objective
from trajsurgery.checkpoint import METRICS, Log, Training, save
from trajsurgery.errors import RecipeError
from trajsurgery.node import Velocity
from trajsurgery.pipelines import Surgery, operate
from trajsurgery.plan import Plan
from trajsurgery.recipe import Recipe
from trajsurgery.surgery import apply, backward, distances, values
from trajsurgery.world import Embeddings, World, call_of, threshold

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


def generator(seed: int, iteration: int, purpose: str) -> torch.Generator:
    """The draws of one iteration: no state is carried from one to the next, so that none has to be saved."""
    number = (seed * 1_000_003 + iteration) * len(_PURPOSES) + _PURPOSES.index(purpose)
    return torch.Generator().manual_seed(number)


def train(recipe: Recipe, world: World, training: Training, watch: Callable[[Iteration], None]) -> bool:
    """Runs the iterations that are left; says whether all were run (False: interrupted, and saved).

    Args:
        watch: called with each iteration's record, once it is in the log.

    Raises:
        RecipeError: three iterations in a row had no finite loss and gradient.
    """
    embeddings = Embeddings(world.pipe, world.texts)
    lambda_, log = threshold(recipe, world), Log(recipe.output / METRICS)
    with _interruptions() as asked:
        while training.iteration < recipe.iterations and not asked:
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
    return training.iteration >= recipe.iterations


def iterate(recipe: Recipe, world: World, embeddings: Embeddings, training: Training, lambda_: float) -> Iteration:
    """One iteration: one plan or several, a batch in one or more rollouts, one step of the optimiser."""
    began, number = time.monotonic(), training.iteration + 1
    draws = {purpose: generator(recipe.seed, number, purpose) for purpose in _PURPOSES}
    plans = [recipe.method.draw(recipe.rollout.steps, draws["plan"]) for _ in range(recipe.rollout.plans)]
    texts = world.draw(recipe.rollout.batch, draws["prompts"])
    at_once = recipe.rollout.at_once or len(texts)
    sums = torch.zeros(6, device=world.device)
    with alarm.untouched_is_none(training.parameters):
        for start in range(0, len(texts), at_once):
            part = texts[start : start + at_once]
            kwargs = {**embeddings(part), "generator": draws["noise"]}
            scale = lambda_, len(part) / len(texts)
            if len(plans) == 1:
                grades = _pull(recipe, world, plans[0], part, kwargs, draws["renoise"], scale)
            else:
                grades = _pull_several(recipe, world, plans, part, kwargs, draws["renoise"], scale)
            sums += grades * (len(part) / len(texts))
    if all(p.grad is None for p in training.parameters):
        raise RecipeError(_NOTHING)
    norm = torch.nn.utils.clip_grad_norm_(training.parameters, recipe.optimiser.clip)
    found = torch.cat([sums, norm.reshape(1).to(sums)]).tolist()  # the iteration's one wait for the device
    reward, loss, clamped, weight, closed, _, grad_norm = found
    healthy = bool(torch.tensor(found).isfinite().all())
    idle = _idle(training) if healthy and loss > 0 and not training.looked else None
    skipped = _step(recipe, training, healthy)
    nodes = {n for plan in plans for n in plan.nodes}
    times = sorted({n.t for n in nodes if isinstance(n, Velocity) and isinstance(n.t, int)}, reverse=True)
    seconds = round(time.monotonic() - began, 4)
    return Iteration(number, reward, loss, grad_norm, clamped, weight, closed, skipped, tuple(times), seconds, idle)


_NOTHING = "no parameter of the transformer received a gradient: something between it and the reward detaches."


def _idle(training: Training) -> tuple[str, ...]:
    """The gradient alarm, once in a run: it waits for the device. A hinge that is closed for all images says nothing.

    Raises:
        RecipeError: all are idle.
    """
    names = tuple(alarm.idle(training.module.named_parameters()))
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


def _pull(
    recipe: Recipe,
    world: World,
    plan: Plan,
    texts: list[str],
    kwargs: dict[str, Any],
    renoise: torch.Generator,
    scale: tuple[float, float],
) -> Tensor:
    """One rollout and its gradient, added into `.grad`; [6]: reward, loss, clamped, weight, closed, health (0 or NaN).

    The graph of decoder and reward is run and freed before the transformer's backward pass begins.
    """
    lambda_, share = scale
    images, outputs, found, surgery = _sample(recipe, world, plan, kwargs, renoise)
    decoded = [images, *(surgery.decode(x) for x in outputs[1:])]
    scores = [world.reward(_whole(image), texts) for image in decoded]
    weights = objective.weights(plan, surgery.trajectory, found, recipe.weights_at, recipe.objective.tau)
    loss = objective.loss(scores, weights.w, lambda_)
    cotangents = objective.cotangents(loss * share, outputs)
    if recipe.rollout.memory == "staged":
        backward(plan, surgery.trajectory, surgery.field, cotangents, generator=renoise, check=False)
    else:
        torch.autograd.backward(outputs, cotangents)
    with torch.no_grad():
        reward = scores[0] if plan.exact else world.reward(_whole(surgery.decode(surgery.trajectory[0])), texts)
        health = sum((image.detach().sum() * 0 for image in decoded), loss.detach() * 0)
        closed = (torch.stack([score.detach() for score in scores]) >= lambda_).float().mean()
        return torch.stack([reward.mean(), loss.detach(), weights.clamped, weights.w.mean(), closed, health]).float()


def _pull_several(
    recipe: Recipe,
    world: World,
    plans: list[Plan],
    texts: list[str],
    kwargs: dict[str, Any],
    renoise: torch.Generator,
    scale: tuple[float, float],
) -> Tensor:
    """As `_pull`, for several exact plans: their output is the rollout's x_0, hence one decode and one reward gradient.

    The loss is their mean, each with weights of its own.
    """
    lambda_, share = scale
    with operate(world.pipe) as surgery:
        world.pipe(num_inference_steps=recipe.rollout.steps, **call_of(recipe), **kwargs, output_type="latent")
    x_0, tail = surgery.trajectory[0].detach().requires_grad_(), (surgery.trajectory, surgery.field)
    image = surgery.decode(x_0)
    score = world.reward(_whole(image), texts)
    loss = objective.loss([score], torch.ones_like(score), lambda_)
    (pull,) = objective.cotangents(loss * share / len(plans), (x_0,))
    found: list[objective.Weights] = []
    for plan in plans:
        apart = distances(plan, *tail, generator=renoise) if recipe.weights_at != "none" else {}
        found.append(objective.weights(plan, surgery.trajectory, apart, recipe.weights_at, recipe.objective.tau))
        cotangent = pull * found[-1].w.to(pull).view(-1, *[1] * (pull.dim() - 1))
        if recipe.rollout.memory == "staged":
            backward(plan, *tail, cotangent, generator=renoise, check=False)
        else:
            torch.autograd.backward(apply(plan, *tail, recipe.rollout.memory, generator=renoise), cotangent)
    with torch.no_grad():
        w = torch.stack([weights.w for weights in found]).mean(0)
        clamped = torch.stack([weights.clamped for weights in found]).mean()
        loss = objective.loss([score], w, lambda_)
        health = image.detach().sum() * 0 + loss * 0
        closed = (score >= lambda_).float().mean()
        return torch.stack([score.mean(), loss, clamped, w.mean(), closed, health]).float()


def _sample(
    recipe: Recipe, world: World, plan: Plan, kwargs: dict[str, Any], renoise: torch.Generator
) -> tuple[Tensor, tuple[Tensor, ...], dict[int, Tensor], Surgery]:
    """A rollout through the pipe: images of the plan's first output, all outputs, its leaps' distances, the surgery."""
    rollout, memory = recipe.rollout, recipe.rollout.memory
    call = {"num_inference_steps": rollout.steps, **call_of(recipe), **kwargs}
    if memory != "staged":
        with operate(world.pipe, plan, memory=memory, generator=renoise) as surgery:
            images = world.pipe(**call, output_type="pt")[0]
        return images, surgery.outputs, surgery.distances, surgery
    with operate(world.pipe) as surgery:
        world.pipe(**call, output_type="latent")
    found = values(plan, surgery.trajectory, surgery.field, generator=renoise)
    leaves = tuple(x.detach().requires_grad_() for x in ((found,) if isinstance(found, Tensor) else found))
    measured = recipe.weights_at != "none"
    apart = distances(plan, surgery.trajectory, surgery.field, generator=renoise) if measured else {}
    return surgery.decode(leaves[0]), leaves, apart, surgery


def _whole(images: Tensor) -> Tensor:
    """The images with NaN as grey: a reward may refuse NaN, and the step is skipped for it all the same."""
    return torch.nan_to_num(images, nan=0.5, posinf=1.0, neginf=0.0)


def _give_up(recipe: Recipe, training: Training) -> None:
    """Stops the run; the last good weights are in the checkpoint."""
    good = training.finite
    if good:
        save(recipe, training)
    kept = "its weights are good and saved" if good else "its weights are spoilt; the last good ones are saved"
    raise RecipeError(
        f"the run stopped at iteration {training.iteration}: {training.in_a_row} in a row had a loss or gradient that "
        f"is not finite ({training.skipped} in all), and {kept} in {recipe.output}. Lower --optimiser.rate, or raise "
        "--rollout.precision to float32, and start anew with --overwrite or another --output."
    )


@contextmanager
def _interruptions() -> Generator[list[int]]:
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
