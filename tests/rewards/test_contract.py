"""The contract of rewards: refused images, prompts and scores; each error says what was received and the repair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trajsurgery import RewardError
from trajsurgery.rewards.contract import Reward, checkpoint_layers


class Brightness(Reward):
    """The mean of an image's pixels."""

    name, scale, source, licence = "brightness", "in [0, 1]", "here", "Apache-2.0"

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))


class ChangedScores(Brightness):
    """A reward that changes its scores by a function."""

    def __init__(self, change: object) -> None:
        super().__init__()
        self.change = change

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.change(super().score(images, prompts))  # type: ignore[operator]


GREY = torch.full((2, 3, 8, 8), 0.5)
TWO = ["a cat", "a dog"]


def test_a_reward_returns_differentiable_scores() -> None:
    images = GREY.clone().requires_grad_()
    scores = Brightness()(images, TWO)
    assert torch.equal(scores, torch.tensor([0.5, 0.5]))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert torch.allclose(gradient, torch.full_like(images, 1 / 192))
    assert Brightness.threshold is None


@pytest.mark.parametrize(
    "images, prompts, message",
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
def test_invalid_images_and_prompts_are_refused(images: Tensor, prompts: list[str], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Brightness()(images, prompts)


def test_rounding_errors_of_decoders_are_accepted() -> None:
    assert Brightness()(GREY + 0.5005, TWO).shape == (2,)
    assert Brightness()(GREY.bfloat16(), TWO).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.detach(), "without a gradient"),
        (lambda s: s.sum(), r"returned shape \[\] for 2 images"),
        (lambda s: s[:, None], r"shape \[2, 1\]"),
        (lambda s: s.tolist(), "returned list"),
        (lambda s: s / 0, "not finite"),
        (lambda s: s * float("nan"), "not finite"),
    ],
)
def test_invalid_scores_are_refused(change: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        ChangedScores(change)(GREY.clone().requires_grad_(), TWO)


def test_a_detached_reward_may_score_without_gradient() -> None:
    detached = ChangedScores(lambda s: s.detach())
    assert detached(GREY, TWO).shape == (2,)
    with torch.no_grad():
        assert detached(GREY.clone().requires_grad_(), TWO).shape == (2,)


class Deep(Brightness):
    """A reward of three layers that counts their calls."""

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


def test_checkpointing_changes_no_bit_and_saves_less() -> None:
    torch.manual_seed(0)
    plain, saved_elements = Deep(), list[int]()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient() -> Tensor:
        saved_elements.append(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved_elements.__setitem__(-1, saved_elements[-1] + t.numel()) or t, lambda t: t
        ):
            total = plain(images, TWO).sum()
        return torch.autograd.grad(total, images)[0]

    before = gradient()
    checkpoint_layers(plain.layers)
    assert torch.equal(gradient(), before)
    assert saved_elements[1] < saved_elements[0]
    assert not plain.training


def test_autocast_follows_the_attribute() -> None:
    reward = Deep().float()
    dtypes: list[torch.dtype] = []
    reward.layers[0].register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    reward(GREY, TWO)
    reward.autocast = torch.bfloat16
    reward(GREY, TWO)
    assert dtypes == [torch.float32, torch.bfloat16]
