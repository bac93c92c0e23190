"""Rewards made of rewards: weighted sums, and SRPO's relative reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trajsurgery.errors import RewardError
from trajsurgery.rewards.contract import Reward


class Weighted(Reward):
    """sum_i w_i r_i(image, prompt), each term on its reward's own scale; its gradient is the same sum of gradients.

    The threshold is the weighted sum of the parts' thresholds, if all parts state one and no weight is negative: a
    hinge at it closes no earlier than all of them could be reached. Otherwise there is none, and the recipe must state
    it.

    Args:
        parts: rewards and their weights, finite and not zero.

    Raises:
        RewardError: no parts, or such weights.
    """

    licence = "that of its parts"

    def __init__(self, parts: Sequence[tuple[Reward, float]]) -> None:
        super().__init__()
        for reward, weight in parts:
            if not math.isfinite(weight) or not weight:
                raise RewardError(f"the weight of {reward.name} is {weight}: leave it out, or give it a finite one.")
        if not parts:
            raise RewardError("a weighted sum of no rewards has no gradient: give pairs of a reward and its weight.")
        self.parts = nn.ModuleList(reward for reward, _ in parts)
        self.weights = tuple(float(weight) for _, weight in parts)
        self.name = " + ".join(f"{weight:g} {reward.name}" for reward, weight in parts)
        self.scale = "; ".join(f"{weight:g} times {reward.scale}" for reward, weight in parts)
        self.source = "; ".join(reward.source for reward, _ in parts)
        stated = [weight * reward.threshold for reward, weight in parts if reward.threshold is not None]
        usable = len(stated) == len(parts) and min(self.weights) > 0
        self.threshold = sum(stated) if usable else None
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        terms = [weight * part(images, prompts).to(images.device) for part, weight in zip(self.parts, self.weights)]
        return torch.stack(terms).sum(0)


class Relative(Reward):
    """SRPO's reward (Shen et al., 2025, arXiv 2509.06942): (1 + k) r(image, p+) - r(image, p-).

    p+ and p- are the prompt with desired and with undesired words before it. A bias of r that does not depend on the
    words cancels for k = 0; a part k of it stays.

    Args:
        reward: r.
        positive: words, such as "Realistic photo".
        negative: words, such as "CG Render".
        k: how much more the positive prompt counts; at least 0.

    Raises:
        RewardError: k is negative or not finite; the words are the same.
    """

    threshold = 0.7
    """lambda of SRPO's hinge, for HPSv2.1."""
    licence = "that of its reward"

    def __init__(self, reward: Reward, positive: str, negative: str, k: float = 0.0) -> None:
        super().__init__()
        if not math.isfinite(k) or k < 0:
            raise RewardError(f"k = {k}: the positive prompt counts 1 + k times, k a number from 0 on.")
        if positive == negative and not k:
            raise RewardError(f"positive and negative are both {positive!r}: with k = 0 the reward is zero everywhere.")
        self.reward, self.positive, self.negative, self.k = reward, positive, negative, float(k)
        self.name = f"relative {reward.name}"
        self.scale = f"{1 + k:g} times {reward.scale}, less once"
        self.source = f"{reward.source}; arXiv 2509.06942"
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        positive, negative = ([f"{words}. {prompt}" for prompt in prompts] for words in (self.positive, self.negative))
        return (1 + self.k) * self.reward(images, positive) - self.reward(images, negative)
