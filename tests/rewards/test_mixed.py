"""Weighted sums and SRPO's relative reward: values and gradients against sums of their parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import EXACT, STOCK
from trajsurgery import RecipeError, RewardError
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.loading import mixture_parts, mixture_weights
from trajsurgery.rewards.mixtures import Relative, Weighted
from trajsurgery.training.checks import preflight
from trajsurgery.training.recipe import Recipe


class Wave(Reward):
    """A smooth reward whose phase depends on the letters of the prompt."""

    scale, source, licence = "in [-1, 1]", "here", "Apache-2.0"

    def __init__(self, frequency: float, threshold: float | None = None) -> None:
        super().__init__()
        self.name, self.frequency, self.threshold = f"wave {frequency:g}", frequency, threshold

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        phases = torch.tensor([sum(map(ord, prompt)) for prompt in prompts], dtype=images.dtype)
        return (self.frequency * images + phases[:, None, None, None]).sin().mean((1, 2, 3))


TEXTS = ["a cat", "two dogs"]


def images() -> Tensor:
    return torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def wave_gradient(frequency: float, pixels: Tensor, prompts: list[str]) -> Tensor:
    """d/dx of the mean of sin(f x + p)."""
    phases = torch.tensor([sum(map(ord, p)) for p in prompts], dtype=torch.float64)[:, None, None, None]
    return frequency * (frequency * pixels + phases).cos() / pixels[0].numel()


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).detach().norm() <= EXACT * expected.detach().norm())


def test_a_weighted_sum() -> None:
    pixels, mixture_parts = images(), [(Wave(3, 0.5), 2.0), (Wave(11, 0.4), 0.25)]
    reward = Weighted(mixture_parts)
    scores = reward(pixels, TEXTS)
    assert close(scores, 2 * mixture_parts[0][0](pixels, TEXTS) + 0.25 * mixture_parts[1][0](pixels, TEXTS))
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert close(gradient, 2 * wave_gradient(3, pixels, TEXTS) + 0.25 * wave_gradient(11, pixels, TEXTS))
    assert reward.threshold == pytest.approx(1.1)
    assert reward.name == "2 wave 3 + 0.25 wave 11"


@pytest.mark.parametrize("parts", [[(Wave(3), 2.0), (Wave(5, 0.4), 1.0)], [(Wave(3, 0.5), -1.0), (Wave(5, 0.4), 1.0)]])
def test_missing_thresholds_and_negative_weights_give_no_threshold(parts: list[tuple[Reward, float]]) -> None:
    assert Weighted(parts).threshold is None


@pytest.mark.parametrize("k", [0, 0.7])
def test_relative_rewards(k: float) -> None:
    pixels, reward = images(), Relative(Wave(3), "Real", "Fake", k)
    good, bad = ["Real. a cat", "Real. two dogs"], ["Fake. a cat", "Fake. two dogs"]
    scores = reward(pixels, TEXTS)
    assert close(scores, (1 + k) * Wave(3)(pixels, good) - Wave(3)(pixels, bad))
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert close(gradient, (1 + k) * wave_gradient(3, pixels, good) - wave_gradient(3, pixels, bad))
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        inner = 0.25 + 0.5 * pixels  # finite steps must stay in [0, 1]
        ahead, back = (reward(inner + s * 1e-5 * direction, TEXTS).sum() for s in (1, -1))
    inner.requires_grad_()
    analytic = float((torch.autograd.grad(reward(inner, TEXTS).sum(), inner)[0] * direction).sum())
    assert abs(analytic - float(ahead - back) / 2e-5) <= STOCK * abs(analytic)
    assert (reward.threshold, reward.name) == (0.7, "relative wave 3")


def test_mixtures_nest() -> None:
    pixels = images()
    mixture = Weighted([(Relative(Wave(3), "Real", "Fake"), 1.0), (Wave(5), 0.5)])
    expected = Relative(Wave(3), "Real", "Fake")(pixels, TEXTS) + 0.5 * Wave(5)(pixels, TEXTS)
    assert close(mixture(pixels, TEXTS), expected)


def test_invalid_mixtures_are_refused() -> None:
    with pytest.raises(RewardError, match="no rewards"):
        Weighted([])
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(RewardError, match="the weight of wave 3 is"):
            Weighted([(Wave(3), weight)])
    with pytest.raises(RewardError, match="k = -1"):
        Relative(Wave(3), "Real", "Fake", -1)
    with pytest.raises(RewardError, match="zero everywhere"):
        Relative(Wave(3), "Real", "Real")
    with pytest.raises(RewardError, match=r"2 wave 3 received images with NaN"):
        Weighted([(Wave(3), 2.0)])(images() * float("nan"), TEXTS)


def test_parts_with_one_name_are_both_listed() -> None:
    """A mixture of two weights files of one reward."""
    a, b = Wave(1.0), Wave(1.0)
    assert mixture_parts(Weighted([(a, 0.5), (b, 0.5)])) == {"0.5*wave 1": a, "0.5*wave 1 (2)": b}


@pytest.mark.parametrize(
    "reward, weights",
    [
        ("hpsv2.1", {}),
        ("a.b:C", {}),
        ("hpsv2.1:weights/2*3.pt", {}),
        ("0.7*hpsv2.1+0.3*pickscore", {"hpsv2.1": 0.7, "pickscore": 0.3}),
        (" 1e-1 * a.b:C - 2*tiny:scorer_b + .5*x ", {"a.b:C": 0.1, "tiny:scorer_b": -2.0, "x": 0.5}),
        ("-1*tiny", {"tiny": -1.0}),
        ("1*hpsv2.1:a+b.pt+2.*remote:here:1", {"hpsv2.1:a+b.pt": 1.0, "remote:here:1": 2.0}),
    ],
)
def test_mixtures_are_parsed(reward: str, weights: dict[str, float]) -> None:
    assert mixture_weights(reward) == weights


@pytest.mark.parametrize("reward", ["0.7*", "1*tiny+2*tiny", "1*tiny+2*"])
def test_names_that_are_no_mixture_are_refused(reward: str) -> None:
    with pytest.raises(RecipeError, match="a mixture is a weight and a scorer"):
        mixture_weights(reward)
    with pytest.raises(RecipeError, match="a mixture is a weight and a scorer"):
        preflight.check_recipe(Recipe(reward=reward))
