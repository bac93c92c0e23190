"""The contract of rewards: what is refused, and that each refusal says what came in and how to mend it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trajsurgery import RewardError
from trajsurgery.rewards.contract import Reward, checkpoint_layers


class Brightness(Reward):
    """How bright a picture is."""

    name, scale, source, licence = "brightness", "in [0, 1]", "here", "Apache-2.0"

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))


class Spoilt(Brightness):
    """A reward that gives back what it is told."""

    def __init__(self, spoil: object) -> None:
        super().__init__()
        self.spoil = spoil

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.spoil(super().score(images, prompts))  # type: ignore[operator]


GREY = torch.full((2, 3, 8, 8), 0.5)
TWO = ["a cat", "a dog"]


def test_a_reward_is_a_score_and_what_it_says_about_itself() -> None:
    images = GREY.clone().requires_grad_()
    scores = Brightness()(images, TWO)
    assert torch.equal(scores, torch.tensor([0.5, 0.5]))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert torch.allclose(gradient, torch.full_like(images, 1 / 192))
    assert Brightness.threshold is None


@pytest.mark.parametrize(
    "images, prompts, said",
    [
        (GREY[0], TWO, r"received \[3, 8, 8\] and 2 prompts"),
        (GREY[:, :1], TWO, r"\[2, 1, 8, 8\]"),
        (GREY, ["a cat"], "1 prompts"),
        (GREY, "a cat", "one string"),
        (GREY[:0], [], "no pixel"),
        ((GREY * 255).to(torch.uint8), TWO, r"torch.uint8: divide bytes by 255"),
        (GREY + torch.linspace(-1, 0.5, 8), TWO, r"from -0.5 to 1"),
        (GREY * 255, TWO, r"received values from 128 to 128"),
        (GREY * float("nan"), TWO, "images with NaN"),
        (GREY * float("inf"), TWO, "to inf"),
    ],
)
def test_what_a_reward_does_not_take(images: Tensor, prompts: list[str], said: str) -> None:
    with pytest.raises(RewardError, match=said):
        Brightness()(images, prompts)


def test_decoders_may_round() -> None:
    assert Brightness()(GREY + 0.5005, TWO).shape == (2,)
    assert Brightness()(GREY.bfloat16(), TWO).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda s: s.detach(), "without a gradient"),
        (lambda s: s.sum(), r"returned shape \[\] for 2 images"),
        (lambda s: s[:, None], r"shape \[2, 1\]"),
        (lambda s: s.tolist(), "returned list"),
        (lambda s: s / 0, "not finite"),
        (lambda s: s * float("nan"), "not finite"),
    ],
)
def test_what_a_reward_may_not_give(spoil: object, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        Spoilt(spoil)(GREY.clone().requires_grad_(), TWO)


def test_a_detached_reward_may_grade() -> None:
    detached = Spoilt(lambda s: s.detach())
    assert detached(GREY, TWO).shape == (2,)
    with torch.no_grad():
        assert detached(GREY.clone().requires_grad_(), TWO).shape == (2,)


class Deep(Brightness):
    """Three layers, which count their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3)).double()
        self.calls = 0
        for layer in self.layers:
            layer.register_forward_pre_hook(self.count)
        self.eval().requires_grad_(False)

    def count(self, *_: object) -> None:
        self.calls += 1

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = images.movedim(1, -1)
        for layer in self.layers:
            pixels = layer(pixels)
        return pixels.sum((1, 2, 3))


def test_checkpointing_changes_no_bit_and_keeps_less() -> None:
    torch.manual_seed(0)
    plain, kept = Deep(), list[int]()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient() -> Tensor:
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.__setitem__(-1, kept[-1] + 1) or t, lambda t: t):
            total = plain(images, TWO).sum()
        return torch.autograd.grad(total, images)[0]

    before = gradient()
    checkpoint_layers(plain.layers)
    assert torch.equal(gradient(), before)
    assert kept[1] < kept[0]
    assert not plain.training


def test_autocast_is_an_attribute() -> None:
    reward = Deep().float()
    seen: list[torch.dtype] = []
    reward.layers[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    reward(GREY, TWO)
    reward.autocast = torch.bfloat16
    reward(GREY, TWO)
    assert seen == [torch.float32, torch.bfloat16]
