"""The base class of rewards: what a reward states, what it receives, and checks of its input and output."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trajsurgery.errors import RewardError
from trajsurgery.surgery.deferred_checks import require

SLACK = 1e-3
"""How far outside [0, 1] a value may lie: decoders round."""


class Reward(nn.Module, ABC):
    """`reward(images, prompts)`: images Float[batch 3 h w] in [0, 1] of any size and a text for each, to Float[batch].

    It is differentiable in the images; its weights are frozen and in eval mode. A subclass sets the attributes below
    and writes `score`; this class checks input and output.

    Raises:
        RewardError: images of another shape, dtype or range, or with NaN; another number of prompts; scores that are
            not one finite number an image, or that lost the gradient.
    """

    name: str
    scale: str
    """What a score is, and its range."""
    threshold: float | None = None
    """lambda of the hinge that fits the scale; None if nobody has published one."""
    alpha: float | None = None
    """The discount of nested gradients that the LeapAlign paper uses with it (appendix E)."""
    learning_rate: float | None = None
    """AdamW's, from the same table."""
    source: str
    licence: str
    """Of the weights."""
    autocast: torch.dtype | None = None
    """Set it to torch.bfloat16 to run the model under autocast."""
    rounded: bool = False
    """Set it to True for the originals' numbers on picture files: values that PIL rounds to 255 levels are rounded here
    too, and the gradient ignores the rounding.
    """
    differentiable: bool = True
    """False for judges that answer in text: they score and can't be trained on."""

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return Float[batch], for images and prompts that were checked."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float[batch], the scores; see the class."""
        texts = _check_prompts(self.name, images, prompts)
        _check_images(self.name, images)
        if images.requires_grad and torch.is_grad_enabled() and not self.differentiable:
            raise RewardError(
                f"{self.name} answers in text and has no gradient: it can't be trained on. Let it grade: as one of "
                "evaluation.metrics, as a guard, with `trajsurgery score`, or on images.detach()."
            )
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            scores: Any = self.score(images, texts)
        return _check_scores(self.name, images, scores)


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Gradient checkpointing of each layer, also in eval mode, where transformers and open_clip switch it off."""
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def _check_prompts(name: str, images: Tensor, prompts: Sequence[str]) -> list[str]:
    if images.dim() != 4 or images.shape[1] != 3 or isinstance(prompts, str) or len(prompts) != len(images):
        raise RewardError(
            f"{name} takes images [batch, 3, h, w] and one prompt for each; received {list(images.shape)} and "
            f"{'one string' if isinstance(prompts, str) else f'{len(prompts)} prompts'}."
        )
    if not images.numel():
        raise RewardError(f"{name} received no pixel: {list(images.shape)}.")
    return [str(prompt) for prompt in prompts]


def _check_images(name: str, images: Tensor) -> None:
    if not images.is_floating_point():
        raise RewardError(
            f"{name} takes images of floats in [0, 1], received {images.dtype}: divide bytes by 255, but note that no "
            "gradient passes a rounding."
        )
    low, high = torch.aminmax(images.detach())

    def error() -> RewardError:
        if math.isnan(low):
            return RewardError(f"{name} received images with NaN: the sampler or the decoder has diverged.")
        return RewardError(
            f"{name} takes images in [0, 1], received values from {low:.3g} to {high:.3g}: ask the pipeline for "
            "output_type='pt', map [-1, 1] by x / 2 + 0.5, or divide bytes by 255."
        )

    require((low >= -SLACK) & (high <= 1 + SLACK), error)


def _check_scores(name: str, images: Tensor, scores: Any) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (len(images),):
        received = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"{name} returned {received} for {len(images)} images: `score` gives one number an image.")
    numbers = scores.detach()
    require(
        numbers.isfinite().all(),
        lambda: RewardError(
            f"{name} gave scores that are not finite ({numbers.tolist()}): its weights are spoilt, or too large for "
            f"{numbers.dtype}; load them in float32."
        ),
    )
    if images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
        raise RewardError(
            f"{name} gave scores without a gradient to the images: somewhere `score` leaves autograd (no_grad, detach, "
            "item, numpy, PIL or a rounding)."
        )
    return scores
