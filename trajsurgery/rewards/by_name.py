"""What the names of rewards and further scorers stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.rewards import contract
from trajsurgery.rewards.mixed import Weighted
from trajsurgery.rewards.named import KNOWN, load_packaged

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""reward(images, prompts): Float[batch 3 h w] in [0, 1] and a text for each, to scores Float[batch], differentiable."""


_NUMBER = r"\s*(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FIRST, _NEXT = (re.compile(rf"\s*([+-]{sign}{_NUMBER})\s*\*\s*") for sign in ("?", ""))


def mixture_weights(asked: str) -> dict[str, float]:
    """{name: weight} of a mixture such as "0.7*hpsv2.1+0.3*pickscore"; {} for a single scorer's name.

    Raises:
        RecipeError: a weight without a name; a name that stands there twice.
    """
    begun = _FIRST.match(asked)
    if begun is None:
        return {}
    words = [begun[1], *_NEXT.split(asked[begun.end() :])]
    names, weights = [name.strip() for name in words[1::2]], [float(w.replace(" ", "")) for w in words[::2]]
    if not all(names) or len(set(names)) < len(names):
        raise RecipeError(
            f"reward {asked!r}: a mixture is a weight and a scorer for each part, no scorer twice, such as "
            "'0.7*hpsv2.1+0.3*pickscore'."
        )
    return dict(zip(names, weights, strict=True))


class WrappedReward(contract.Reward):
    """A scorer that is no `trajsurgery.rewards.contract.Reward` as one: its scores are looked at as theirs are."""

    source = licence = "not stated"

    def __init__(self, name: str, scorer: Reward) -> None:
        super().__init__()
        self.name, self.scorer = name, scorer
        self.scale = str(getattr(scorer, "scale", "its own"))
        self.threshold = getattr(scorer, "threshold", None)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Float[batch], the scorer's own."""
        return self.scorer(images, prompts)


def mixture_parts(reward: Reward) -> dict[str, Reward]:
    """The rewards that a mixture is made of, {"0.7*hpsv2.1": ...}: each is to be seen beside their sum."""
    if not isinstance(reward, Weighted):
        return {}
    made: list[Any] = list(reward.parts)
    found: dict[str, Reward] = {}
    for part, weight in zip(made, reward.weights, strict=True):
        name = f"{weight:g}*{part.name}"
        found[name if name not in found else f"{name} ({len(found) + 1})"] = part  # one reward with other weights
    return found


def load_reward(asked: str, device: torch.device) -> Reward:
    """The scorer of a name, or the weighted sum that a mixture of names stands for.

    Raises:
        RecipeError: the name stands for nothing.
        RewardError: its weights are not there; a part's weight is zero.
    """
    mixed = [(part, load_reward(part, device), weight) for part, weight in mixture_weights(asked).items()]
    if mixed:
        return Weighted([(r if isinstance(r, contract.Reward) else WrappedReward(part, r), w) for part, r, w in mixed])
    name, _, rest = asked.partition(":")
    if name == "tiny":
        return import_module("trajsurgery.tiny").Reward(rest or "scorer")
    found = load_packaged(asked)
    if found is not None:
        return found.to(device)
    try:
        return getattr(import_module(name), rest)()
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"reward = {asked!r} could not be made ({error}): it is tiny, tiny:SCORER, {KNOWN} or "
            "MODULE:NAME, which is called without arguments and returns reward(images, prompts) -> scores."
        ) from error


def score_one(name: str, reward: Reward, image: Tensor, text: str) -> Tensor:
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
