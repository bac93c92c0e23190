"""Looks at held-out rewards while a run trains: they are logged, and may stop it and keep its best weights.

A look grades images of validation prompts, by the averaged weights, always from the same noise: by the reward, and by
scorers that no gradient climbs. A reward that rises while they fall is being hacked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trajsurgery.errors import RecipeError
from trajsurgery.evaluation.held_out import Scores, evaluate, spread
from trajsurgery.rewards.by_name import terms
from trajsurgery.training.anchor import exchanged
from trajsurgery.training.checkpoint import METRICS, Log, Training, save, write_whole
from trajsurgery.training.components import Embeddings, RunComponents
from trajsurgery.training.recipe import Recipe


@dataclass(frozen=True)
class ValidationResult:
    """One line of metrics.jsonl. Means are over the look's images."""

    kind: Literal["look"] = field(default="look", kw_only=True)
    iteration: int
    """How many were done; 0 is the untuned model."""
    reward: float
    metrics: dict[str, float]
    """By name, of scorers that no gradient climbs, and of the parts of a reward that is a sum."""
    rule: float | None
    """The share that the rules call right, where there are rules."""
    spread: dict[str, float]
    """The standard deviation over the images of each of them, by the names of `metrics`, "reward" and "rule"."""
    best: int
    """The look, by its iteration, at which the scorer that may stop the run was highest."""
    waited: int
    """The looks since then."""
    seconds: float


def scorer(recipe: Recipe, world: RunComponents) -> str:
    """The name of the scorer that may stop the run.

    Raises:
        RecipeError: there is none beside the reward, or none of that name; it is a part of the reward.
    """
    asked, there = recipe.guards.by, [name for name in world.metrics if name not in terms(recipe.reward)]
    if asked in there:
        return str(asked)
    if asked is None and there:
        return there[0]
    trained = " is a part of the reward, which its own gradient climbs" if asked in terms(recipe.reward) else ""
    raise RecipeError(
        f"guards.every = {recipe.guards.every}, guards.by = {asked}{trained}: a look is judged by a scorer beside the "
        f"reward. There {'are ' + ', '.join(there) if there else 'is none'}; name some with --evaluation.metrics."
    )


def check(recipe: Recipe, world: RunComponents) -> None:
    """Says before any long work what the guards lack.

    Raises:
        RecipeError: as `scorer`; no validation prompts.
    """
    if recipe.guards.every is None:
        return
    scorer(recipe, world)
    if not world.validation:
        raise RecipeError(
            f"guards.every = {recipe.guards.every}, and there are no prompts to look at: they are neither trained on "
            "nor those of the closing evaluation. Pass --guards.prompts FILE."
        )


def looking(
    recipe: Recipe, world: RunComponents, training: Training, told: Callable[[ValidationResult], None]
) -> Callable[[], bool]:
    """A function that looks if a look is due, and says whether the run may go on. Without guards it does nothing."""
    every = recipe.guards.every
    if every is None:
        return lambda: True
    judge = scorer(recipe, world)
    shown = replace(recipe, evaluation=replace(recipe.evaluation, images=recipe.guards.images, pictures=1))
    looked_at = replace(world, heldout=world.validation)
    embeddings = Embeddings(world.pipe, [prompt.text for prompt in spread(world.validation, recipe.guards.images)])

    def look() -> bool:
        if training.iteration % every == 0 and training.early_stopping.last != training.iteration and training.finite:
            began = time.monotonic()
            with exchanged(training.parameters, training.ema.shadow_params):
                found = evaluate(shown, looked_at, embeddings)
            best = training.early_stopping.update(training.iteration, float(found.metrics[judge].mean()))
            training.seconds += time.monotonic() - began
            line = _line(training, found, time.monotonic() - began)
            Log(recipe.output / METRICS).append(asdict(line))
            if best and recipe.guards.patience is not None:
                _keep(recipe, training)
            told(line)
        return not training.early_stopping.stops(recipe.guards.patience)

    return look


def _line(training: Training, found: Scores, seconds: float) -> ValidationResult:
    graded = {**found.metrics, "reward": found.reward} | ({} if found.correct is None else {"rule": found.correct})
    means = {name: float(values.double().mean()) for name, values in graded.items()}
    spread = {name: float(values.double().std()) for name, values in graded.items()}
    reward, rule, watch = means.pop("reward"), means.pop("rule", None), training.early_stopping
    return ValidationResult(
        training.iteration, reward, means, rule, spread, watch.best, watch.waited, round(seconds, 4)
    )


def _file(output: Path, iteration: int) -> Path:
    return output / f"best-{iteration:06d}.pt"


def _keep(recipe: Recipe, training: Training) -> None:
    """Writes the averaged weights of the best look, then the checkpoint that names them, then drops earlier ones."""
    file = _file(recipe.output, training.iteration)
    write_whole(file, lambda path: torch.save([p.detach() for p in training.ema.shadow_params], path))
    save(recipe, training)
    for other in recipe.output.glob("best-*.pt"):
        if other != file:
            other.unlink()


def restore_best(recipe: Recipe, training: Training) -> None:
    """Makes the averaged weights those of the best look, where a recipe keeps them."""
    if recipe.guards.patience is None:
        return
    file = _file(recipe.output, training.early_stopping.best)
    try:
        kept: list[torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise RecipeError(
            f"{file}, the weights of the best look, can't be read ({error}). Start the run anew with --overwrite."
        ) from error
    with torch.no_grad():
        for average, value in zip(training.ema.shadow_params, kept, strict=True):
            average.copy_(value)


def summary(recipe: Recipe, world: RunComponents, training: Training) -> dict[str, Any]:
    """What the closing line of metrics.jsonl says of the guards; nothing if all are off."""
    guards, found = recipe.guards, dict[str, Any]()
    if guards.every is not None:
        kept = training.iteration if guards.patience is None else training.early_stopping.best
        found |= {"by": scorer(recipe, world), "best": training.early_stopping.best, "kept": kept}
        found["stopped"] = training.early_stopping.stops(guards.patience) and training.iteration < recipe.iterations
    if guards.anchor:
        found["anchor"] = guards.anchor
    return {"guards": found} if found else {}
