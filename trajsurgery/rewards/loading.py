"""Load rewards by the names that recipes and commands use, mixtures of them included."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from trajsurgery.errors import RecipeError, SurgeryError, suggest
from trajsurgery.rewards import contract
from trajsurgery.rewards.mixtures import Weighted
from trajsurgery.rewards.packaged import ALIASES, KNOWN, NAMES, is_packaged, load_packaged, missing_weights
from trajsurgery.rewards.user_code import error_text, import_named
from trajsurgery.tiny.scorer import shipped

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""reward(images, prompts): Float[batch 3 h w] in [0, 1] and a text for each, to scores Float[batch], differentiable."""

_USERS = (
    "MODULE:NAME or FILE.py:NAME, a reward(images, prompts) -> scores, or what makes one when it is called without "
    "arguments"
)

_NUMBER = r"\s*(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FIRST, _NEXT = (re.compile(rf"\s*([+-]{sign}{_NUMBER})\s*\*\s*") for sign in ("?", ""))


def mixture_weights(text: str) -> dict[str, float]:
    """Return {name: weight} of a mixture such as "0.7*hpsv2.1+0.3*pickscore"; {} for a single name.

    Raises:
        RecipeError: a weight without a name; a name that occurs twice.
    """
    first = _FIRST.match(text)
    if first is None:
        return {}
    words = [first[1], *_NEXT.split(text[first.end() :])]
    names, weights = [name.strip() for name in words[1::2]], [float(w.replace(" ", "")) for w in words[::2]]
    if not all(names) or len(set(names)) < len(names):
        raise RecipeError(
            f"reward {text!r}: a mixture is a weight and a scorer for each part, no scorer twice, such as "
            "'0.7*hpsv2.1+0.3*pickscore'."
        )
    return dict(zip(names, weights, strict=True))


class WrappedReward(contract.Reward):
    """A scorer of another class, wrapped so that the checks of `Reward` apply to it."""

    source = licence = "not stated"

    def __init__(self, name: str, scorer: Reward) -> None:
        super().__init__()
        self.name, self.scorer = name, scorer
        self.scale = str(getattr(scorer, "scale", "its own"))
        self.threshold = getattr(scorer, "threshold", None)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return the scorer's own scores, Float[batch]."""
        return self.scorer(images, prompts)


def mixture_parts(reward: Reward) -> dict[str, Reward]:
    """Return the parts of a mixture, {"0.7*hpsv2.1": ...}, so that each is reported beside their sum."""
    if not isinstance(reward, Weighted):
        return {}
    parts: list[Any] = list(reward.parts)
    named_parts: dict[str, Reward] = {}
    for part, weight in zip(parts, reward.weights, strict=True):
        name = f"{weight:g}*{part.name}"
        named_parts[name if name not in named_parts else f"{name} ({len(named_parts) + 1})"] = (
            part  # one reward with other weights
        )
    return named_parts


def load_reward(name_of_reward: str, device: torch.device) -> Reward:
    """Load the scorer of a name, or the weighted sum of a mixture; modules move to the device.

    Raises:
        RecipeError: an unknown name.
        RewardError: its weights are missing; a part's weight is zero.
    """
    mixed = [(part, load_reward(part, device), weight) for part, weight in mixture_weights(name_of_reward).items()]
    if mixed:
        return Weighted([(r if isinstance(r, contract.Reward) else WrappedReward(part, r), w) for part, r, w in mixed])
    name, _, rest = name_of_reward.partition(":")
    if name == "tiny":
        return import_module("trajsurgery.tiny").Reward(rest or "scorer").to(device)
    packaged = load_packaged(name_of_reward)
    if packaged is not None:
        return packaged.to(device)
    return _load_users_reward(name_of_reward, device)


@contextmanager
def quiet_rewards() -> Generator[None]:
    """Load rewards without progress bars and without open_clip's warning about models without pretrained weights."""
    from transformers.utils import logging as bars

    def is_worth_showing(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    logging.getLogger().addFilter(is_worth_showing)
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_worth_showing)
        if shown:
            bars.enable_progress_bar()


def _load_users_reward(name: str, device: torch.device) -> Reward:
    """Import MODULE:NAME or FILE.py:NAME; call it if it is a class, or a function that makes a reward."""
    target = _import_users_reward(name)
    try:
        reward: Any = on_device(target() if _makes_a_reward(target) else target, device)
    except SurgeryError:
        raise
    except Exception as error:
        raise RecipeError(f"reward {name!r}: it could not be made, {error_text(error)}.") from error
    if not callable(reward):
        raise RecipeError(f"reward {name!r} is {type(reward).__name__}, which can't be called: {_USERS}.")
    return cast(Reward, reward)


def on_device(reward: Any, device: torch.device) -> Any:
    """Return a reward, moved to a device if it is a module."""
    return reward.to(device) if isinstance(reward, nn.Module) else reward


def reward_problem(reward: str) -> str | None:
    """Return what a reward is missing here and how to fix it; None if nothing. Users' code is imported, not called."""
    try:
        mixed = mixture_weights(reward)
        name, _, rest = reward.partition(":")
        if mixed:
            return " ".join(problem for part in mixed if (problem := reward_problem(part))) or None
        if name == "tiny":
            exists = ("", "scorer", *shipped())
            known = f"the embedded world ships tiny{' tiny:'.join(exists)}."
            return None if rest in exists else f"no reward {reward!r}: {known}{suggest(rest, exists)}"
        if is_packaged(reward):
            return missing_weights(reward)
        _import_users_reward(reward)
    except RecipeError as error:
        return str(error)
    return None


def _import_users_reward(name: str) -> Any:
    if ":" not in name:
        names = ("tiny", *NAMES, *ALIASES)
        raise RecipeError(f"no reward {name!r}.{suggest(name, names)} It is tiny, tiny:SCORER, {KNOWN}, or {_USERS}.")
    return import_named(name)


def _makes_a_reward(target: Any) -> bool:
    """Whether this is a class or a function without required arguments, rather than a reward."""
    if isinstance(target, nn.Module) or not callable(target):  # a module's signature names no argument
        return False
    parameters = inspect.signature(target).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return isinstance(target, type) or not needed


def score_one(name: str, reward: Reward, image: Tensor, text: str) -> Tensor:
    """Return the score of one image, [1].

    Raises:
        RecipeError: the reward gives no score for each image.
    """
    scores: Any = reward(image, [text])
    if not isinstance(scores, Tensor) or scores.shape != (1,):
        received = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RecipeError(
            f"reward {name!r} gave {received} for one image: it takes Float[batch 3 h w] and a list of as many "
            "prompts, and returns the scores, Float[batch]."
        )
    return scores
