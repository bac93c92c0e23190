"""The reward of the world: a real open_clip CLIP, small, robust, and frozen."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RewardError
from trajsurgery.tiny.prompt import Prompt
from trajsurgery.tiny.scene import SIDE
from trajsurgery.tiny.tokenizers import TEXT_LENGTH, clip_tokenizer

MODEL = "trajsurgery-tiny"
WEIGHTS = Path(__file__).parent / "weights" / "scorer"


def configuration(vocabulary: int) -> dict[str, Any]:
    """The open_clip model config: images of SIDE pixels in patches of eight, texts of TEXT_LENGTH tokens."""
    return {
        "embed_dim": 96,
        "vision_cfg": {
            "image_size": SIDE,
            "layers": 4,
            "width": 128,
            "head_width": 32,
            "patch_size": 8,
            "pool_type": "avg",
        },
        "text_cfg": {
            "context_length": TEXT_LENGTH,
            "vocab_size": vocabulary,
            "width": 64,
            "heads": 4,
            "layers": 3,
            "no_causal_mask": True,
        },
    }


def new_clip(folder: Path) -> tuple[Any, Any]:
    """An untrained CLIP and its tokenizer; config and tokenizer files are written to the folder."""
    import open_clip

    tokenizer = clip_tokenizer(folder / "tokenizer")
    (folder / f"{MODEL}.json").write_text(json.dumps(configuration(len(tokenizer)), indent=1) + "\n")
    open_clip.add_model_config(folder / f"{MODEL}.json")
    return open_clip.create_model(MODEL), open_clip.tokenizer.HFTokenizer(
        str(folder / "tokenizer"), context_length=TEXT_LENGTH
    )


def normalised(images: Tensor) -> Tensor:
    """Images in [0, 1] to the tower's range, [-1, 1]."""
    return 2 * images - 1


class Reward(nn.Module):
    """How well pictures fit their prompts: the cosine of CLIP's image and text embeddings.

    `reward(images, prompts)` takes images Float[batch 3 32 32] in [0, 1] and a text or `Prompt` for each, and returns
    Float[batch] in [-1, 1]. It is differentiable in the images, its weights are frozen, and it takes images of its own
    dtype, float32 or, after `.double()`, float64. `threshold` is the lambda of the hinge
    that fits it: the reward that four in five correct renders reach, so that a hinge at it can close.

    Raises RewardError for images of another shape, dtype or range, with NaN, or for another number of prompts.
    """

    name = "tiny-clip"
    scale = "cosine, in [-1, 1]"

    def __init__(self, folder: Path = WEIGHTS) -> None:
        import open_clip

        super().__init__()
        open_clip.add_model_config(folder / f"{MODEL}.json")
        self.clip: Any = open_clip.create_model(MODEL, pretrained=str(folder / "model.safetensors"))
        self.tokenizer = open_clip.tokenizer.HFTokenizer(str(folder / "tokenizer"), context_length=TEXT_LENGTH)
        self.threshold = float(json.loads((folder / "threshold.json").read_text())["threshold"])
        self.eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    def forward(self, images: Tensor, prompts: Sequence[str | Prompt]) -> Tensor:
        """Float[batch], the cosines; see the class."""
        self._check(images, prompts)
        pictures = self.clip.encode_image(normalised(images), normalize=True)
        return (pictures * self.embed([str(prompt) for prompt in prompts])).sum(-1)

    def embed(self, texts: list[str]) -> Tensor:
        """Float[texts 96], unit text embeddings; each text is encoded once, and kept.

        By itself: in a batch the rounding would hang on the texts beside it, and so on what was asked before.
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

    def _check(self, images: Tensor, prompts: Sequence[str | Prompt]) -> None:
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
        if isinstance(prompts, str) or len(prompts) != len(images):
            received = "one string" if isinstance(prompts, str) else f"{len(prompts)}"
            raise RewardError(f"{self.name} takes one prompt an image: {len(images)} images, prompts: {received}")
        low, high = torch.stack(torch.aminmax(images.detach())).tolist()  # the one wait for the device
        if math.isnan(low):
            raise RewardError(f"{self.name} received images with NaN: the sampler or the decoder has diverged")
        if low < -1e-3 or high > 1 + 1e-3:
            raise RewardError(
                f"{self.name} takes images in [0, 1], received values from {low:.3g} to {high:.3g}: "
                "ask the pipeline for output_type='pt', or map [-1, 1] by x / 2 + 0.5"
            )
