"""What the names of rewards and further scorers stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.recipe import Recipe
from trajsurgery.rewards.named import KNOWN, named

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""reward(images, prompts): Float[batch 3 h w] in [0, 1] and a text for each, to scores Float[batch], differentiable."""


def further(recipe: Recipe) -> tuple[str, ...]:
    """The scorers beside the reward, which grade the held-out images: those named, else those of the embedded world."""
    named = recipe.evaluation.metrics
    if named is not None:
        return tuple(dict.fromkeys(named))
    if recipe.model not in ("tiny", "tiny:sd3") or recipe.heldout != "tiny":
        return ()
    known = ("tiny", *(f"tiny:{name}" for name in import_module("trajsurgery.tiny.variant").shipped()))
    return tuple(name for name in known if name != recipe.reward)


def scorer(asked: str, device: torch.device) -> Reward:
    """The scorer of a name.

    Raises:
        RecipeError: the name stands for nothing.
        RewardError: its weights are not there.
    """
    name, _, rest = asked.partition(":")
    if name == "tiny":
        return import_module("trajsurgery.tiny").Reward(rest or "scorer")
    found = named(asked)
    if found is not None:
        return found.to(device)
    try:
        return getattr(import_module(name), rest)()
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"reward = {asked!r} could not be made ({error}): it is tiny, tiny:SCORER, {KNOWN} or "
            "MODULE:NAME, which is called without arguments and returns reward(images, prompts) -> scores."
        ) from error


def ask(name: str, reward: Reward, image: Tensor, text: str) -> Tensor:
    """The score of one image, [1].

    Raises:
        RecipeError: no score for each image.
    """
    scores: Any = reward(image, [text])
    if not isinstance(scores, Tensor) or scores.shape != (1,):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RecipeError(
            f"reward {name!r} gave {found} for one image: it takes Float[batch 3 h w] and a list of as many "
            "prompts, and returns the scores, Float[batch]."
        )
    return scores
