"""Validation while a run trains: scores on validation prompts, early stopping, and the best weights.

A round scores images of validation prompts, made with the averaged weights and always from the same noise, by the
reward and by scorers that are not trained on. A reward that rises while the others fall is being hacked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from trajsurgery.errors import RecipeError
from trajsurgery.evaluation.held_out import HeldOutScores, evaluate, spread_over_categories
from trajsurgery.rewards.loading import mixture_weights
from trajsurgery.training.anchor import swapped
from trajsurgery.training.checkpoints.checkpoint import save_best
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache, RunComponents
from trajsurgery.training.recipe import Recipe


@dataclass(frozen=True)
class ValidationResult:
    """One line of metrics.jsonl. Means are over the round's images."""

    kind: Literal["look"] = field(default="look", kw_only=True)
    iteration: int
    """Finished iterations; 0 is the untuned model."""
    reward: float
    metrics: dict[str, float]
    """Means of scorers that are not trained on, and of the parts of a reward that is a sum."""
    rule: float | None
    """The share that the rules call right, if there are rules."""
    spread: dict[str, float]
    """Standard deviation over the images, by the names of `metrics`, "reward" and "rule"."""
    best: int
    """Iteration of the round in which the scorer that may stop the run was highest."""
    waited: int
    """Rounds since then."""
    seconds: float
    not_finite: dict[str, int] = field(default_factory=dict[str, int])
    """Scores that are not finite, by name; means leave them out. With some of `guards.by`, a round is not the best."""


def stopping_scorer(recipe: Recipe, world: RunComponents) -> str:
    """Return the name of the scorer that may stop the run.

    Raises:
        RecipeError: there is no scorer beside the reward, or none of that name, or it is a part of the reward.
    """
    name, scorers = recipe.guards.by, [name for name in world.metrics if name not in mixture_weights(recipe.reward)]
    if name in scorers:
        return str(name)
    if name is None and scorers:
        return scorers[0]
    reason = " is a part of the reward, which its own gradient climbs" if name in mixture_weights(recipe.reward) else ""
    raise RecipeError(
        f"guards.every = {recipe.guards.every}, guards.by = {name}{reason}: a validation round needs a scorer that "
        f"is not trained on. There {'are ' + ', '.join(scorers) if scorers else 'is none'}; name some with "
        "--evaluation.metrics."
    )


def check_guards(recipe: Recipe, world: RunComponents) -> None:
    """Raise if the guards lack a scorer or prompts.

    Raises:
        RecipeError: as `stopping_scorer`; no validation prompts.
    """
    if recipe.guards.every is None:
        return
    stopping_scorer(recipe, world)
    if not world.validation:
        raise RecipeError(
            f"guards.every = {recipe.guards.every}, and there are no validation prompts, which are neither trained on "
            "nor those of the closing evaluation. Pass --guards.prompts FILE."
        )


def validation_callback(
    recipe: Recipe, world: RunComponents, training: TrainingState, on_result: Callable[[ValidationResult], None]
) -> Callable[[], bool]:
    """Return a function that validates if a round is due, and returns whether the run may continue."""
    every = recipe.guards.every
    if every is None:
        return lambda: True
    scorer_name = stopping_scorer(recipe, world)
    round_recipe = replace(recipe, evaluation=replace(recipe.evaluation, images=recipe.guards.images, pictures=1))
    validation_world = replace(world, heldout=world.validation)
    embeddings = PromptCache(
        world.pipe, [prompt.text for prompt in spread_over_categories(world.validation, recipe.guards.images)]
    )

    def validate() -> bool:
        if training.iteration % every == 0 and training.early_stopping.last != training.iteration and training.finite:
            began = time.monotonic()
            with swapped(training.module, training.ema.shadow_params):
                scores = evaluate(round_recipe, validation_world, embeddings)
            best = training.early_stopping.update(training.iteration, float(scores.metrics[scorer_name].mean()))
            training.seconds += time.monotonic() - began
            result = _validation_result(training, scores, time.monotonic() - began)
            Log(recipe.output / METRICS).append(asdict(result))
            if best and recipe.guards.patience is not None:
                save_best(recipe, training)
            on_result(result)
        return not training.early_stopping.stops(recipe.guards.patience)

    return validate


def _validation_result(training: TrainingState, scores: HeldOutScores, seconds: float) -> ValidationResult:
    values_by_name = {**scores.metrics, "reward": scores.reward} | (
        {} if scores.correct is None else {"rule": scores.correct}
    )
    bad = {name: int((~values.isfinite()).sum()) for name, values in values_by_name.items()}
    finite = {name: values[values.isfinite()].double() for name, values in values_by_name.items()}
    means = {name: float(values.mean()) for name, values in finite.items()}
    spread = {name: float(values.std()) for name, values in finite.items()}
    reward, rule, stopping = means.pop("reward"), means.pop("rule", None), training.early_stopping
    return ValidationResult(
        training.iteration,
        reward,
        means,
        rule,
        spread,
        stopping.best,
        stopping.waited,
        round(seconds, 4),
        {name: count for name, count in bad.items() if count},
    )


def guards_summary(recipe: Recipe, world: RunComponents, training: TrainingState) -> dict[str, Any]:
    """Return what the closing line of metrics.jsonl says about the guards; {} if all are off."""
    guards, summary = recipe.guards, dict[str, Any]()
    if guards.every is not None:
        kept_iteration = training.iteration if guards.patience is None else training.early_stopping.best
        summary |= {"by": stopping_scorer(recipe, world), "best": training.early_stopping.best, "kept": kept_iteration}
        summary["stopped"] = training.early_stopping.stops(guards.patience) and training.iteration < recipe.iterations
    if guards.anchor:
        summary["anchor"] = guards.anchor
    return {"guards": summary} if summary else {}
