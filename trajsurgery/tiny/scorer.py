"""The reward of the world: a small, frozen open_clip CLIP."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RewardError, suggest
from trajsurgery.surgery.deferred_checks import require
from trajsurgery.tiny.pipe import TEXT_LENGTH
from trajsurgery.tiny.prompt import Prompt
from trajsurgery.tiny.scene import SIDE

WEIGHTS = Path(__file__).parent / "weights"
SCORERS = ("scorer", "scorer_b", "scorer_c")
"""The reward, and two further scorers that are not trained on, with other seeds, data and image towers."""


def to_model_range(images: Tensor) -> Tensor:
    """Map images in [0, 1] to the model's range, [-1, 1]."""
    return 2 * images - 1


class Reward(nn.Module):
    """How well pictures fit their prompts: the cosine of CLIP's image and text embeddings.

    `reward(images, prompts)` takes images Float[batch 3 32 32] in [0, 1] and a text or `Prompt` for each, and returns
    Float[batch] in [-1, 1]. It is differentiable in the images and its weights are frozen. Images have its dtype:
    float32, or float64 after `.double()`. `threshold` is the lambda of the hinge that fits it: the reward that four in
    five correct renders reach, so a hinge at it can close.

    `weights` names one of the shipped scorers ("scorer" is the reward, the others are not trained on), or is a folder
    of weights; the image tower is that of the open_clip config beside them.

    Raises RewardError for images of another shape, dtype or range, with NaN, or for another number of prompts; and for
    a scorer without weights.
    """

    scale = "cosine, in [-1, 1]"

    def __init__(self, weights: str | Path = SCORERS[0]) -> None:
        import open_clip

        super().__init__()
        folder = _folder(weights)
        (config,) = folder.glob("trajsurgery-*.json")
        self.name = f"tiny:{folder.name}"
        open_clip.add_model_config(config)
        self.clip: Any = open_clip.create_model(config.stem, pretrained=str(folder / "model.safetensors"))
        self.tokenizer = open_clip.tokenizer.HFTokenizer(str(folder / "tokenizer"), context_length=TEXT_LENGTH)
        self.threshold = float(json.loads((folder / "threshold.json").read_text())["threshold"])
        self.eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    def forward(self, images: Tensor, prompts: Sequence[str | Prompt]) -> Tensor:
        """Float[batch], the cosines; see the class."""
        features = self.features(images)
        check_prompt_count(self.name, images, prompts)
        return (features * self.embed([str(prompt) for prompt in prompts])).sum(-1)

    def features(self, images: Tensor) -> Tensor:
        """Return unit image embeddings, Float[batch 96], of images as in `forward`."""
        self._check(images)
        return self.clip.encode_image(to_model_range(images), normalize=True)

    def embed(self, texts: list[str]) -> Tensor:
        """Return unit text embeddings, Float[texts 96]; each text is encoded once and cached.

        Each is encoded alone: in a batch the rounding would depend on the other texts.
        """
        weight: Tensor = self.clip.text_projection
        for text in texts:
            if text not in self._texts:
                with torch.no_grad():
                    made = self.clip.encode_text(self.tokenizer([text]).to(weight.device), normalize=True)
                self._texts[text] = made[0]
        return torch.stack([self._texts[text] for text in texts]).to(weight)

    def _apply(self, *args: Any, **kwargs: Any) -> "Reward":
        self._texts = {}  # embeddings of another dtype or device are of no use
        return super()._apply(*args, **kwargs)

    def _check(self, images: Tensor) -> None:
        weight: Tensor = self.clip.text_projection
        if images.dim() != 4 or images.shape[1:] != (3, SIDE, SIDE) or not len(images):
            raise RewardError(
                f"{self.name} takes images [batch, 3, {SIDE}, {SIDE}], at least one, received {list(images.shape)}: "
                "decode at the world's size, or resize first"
            )
        if images.dtype != weight.dtype:
            raise RewardError(
                f"{self.name} is {weight.dtype} and received images of {images.dtype}: "
                "convert the images with .to(), or the reward with .float() or .double()"
            )
        check_range(self.name, images)


def check_prompt_count(name: str, images: Tensor, prompts: Sequence[object]) -> None:
    """Raise RewardError unless there is one prompt for each image or video."""
    if isinstance(prompts, str) or len(prompts) != len(images):
        received = "one string" if isinstance(prompts, str) else f"{len(prompts)}"
        raise RewardError(f"{name} takes one prompt an image: {len(images)} images, prompts: {received}")


def check_range(name: str, images: Tensor) -> None:
    """Raise RewardError for values outside [0, 1] or NaN."""
    low, high = torch.aminmax(images.detach())

    def error() -> RewardError:
        if math.isnan(low):
            return RewardError(f"{name} received images with NaN: the sampler or the decoder has diverged")
        return RewardError(
            f"{name} takes images in [0, 1], received values from {low:.3g} to {high:.3g}: "
            "ask the pipeline for output_type='pt', or map [-1, 1] by x / 2 + 0.5"
        )

    require((low >= -1e-3) & (high <= 1 + 1e-3), error)


def _folder(weights: str | Path) -> Path:
    """Return the folder of a scorer, or raise RewardError if it has no weights."""
    folder = WEIGHTS / weights if isinstance(weights, str) else weights
    if isinstance(weights, str) and weights not in SCORERS:
        hint = suggest(weights, SCORERS)
        raise RewardError(f"the embedded world has no scorer {weights!r}.{hint} It has {', '.join(SCORERS)}.")
    if not (folder / "model.safetensors").is_file():
        raise RewardError(
            f"{folder.name}: there are no weights in {folder}; `python -m benchmarks.world.train --stage "
            "scorer_b` makes those of scorer_b, `--stage ship` puts them there"
        )
    return folder


def shipped(weights: Path = WEIGHTS) -> tuple[str, ...]:
    """Return the names of the further scorers whose weights exist."""
    return tuple(name for name in SCORERS[1:] if (weights / name / "model.safetensors").is_file())
