"""HPSv2.1 (Wu et al., 2023, arXiv 2306.09341): a CLIP ViT-H/14 fine-tuned on human preferences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trajsurgery.errors import RewardError

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class HPSv2(nn.Module):
    """The cosine of CLIP's image and text embeddings; logit_scale is not applied, as in the official evaluation.

    `reward(images, prompts)` takes images Float[batch 3 h w] in [0, 1] of any size and a text for each, and returns
    Float[batch] in [-1, 1]: FLUX.1-dev scores about 0.31, tuned models up to about 0.41. As in the official evaluation
    the longer side is resized to the model's (bicubic, antialiased), and the rest is zero before the normalisation.

    Args:
        file: `HPS_v2.1_compressed.pt`; that of the local Hugging Face cache if left out.
        model: the open_clip configuration.

    Raises:
        RewardError: no weights; images of another shape, or another number of prompts.
    """

    name = "hpsv2.1"
    scale = "cosine, in [-1, 1]"
    threshold = 0.55
    """lambda of the paper (section 6.1): above what is reached, so that the hinge never closes."""

    def __init__(self, file: str | None = None, model: str = "ViT-H-14") -> None:
        import open_clip

        super().__init__()
        state = torch.load(file or _cached(), map_location="cpu", weights_only=True)
        self.clip: Any = open_clip.create_model(model)
        self.clip.load_state_dict(state["state_dict"])
        self.tokenizer = open_clip.get_tokenizer(model)
        self.side = int(self.clip.visual.image_size[0])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float[batch], the cosines; see the class."""
        if images.dim() != 4 or images.shape[1] != 3 or isinstance(prompts, str) or len(prompts) != len(images):
            raise RewardError(
                f"{self.name} takes images [batch, 3, h, w] and one prompt for each; received {list(images.shape)} and "
                f"{'one string' if isinstance(prompts, str) else f'{len(prompts)} prompts'}."
            )
        weight: Tensor = self.clip.text_projection
        with torch.no_grad():
            texts = self.clip.encode_text(self.tokenizer([str(p) for p in prompts]).to(weight.device), normalize=True)
        pixels = prepared(images.to(weight), self.side)
        return (self.clip.encode_image(pixels, normalize=True) * texts).sum(-1)


def prepared(images: Tensor, side: int) -> Tensor:
    """The longer side resized to `side`, zeros around it, then CLIP's normalisation: Float[batch 3 side side]."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    size = (round(height * scale), round(width * scale))
    if size != (height, width):
        images = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    above, left = (side - size[0]) // 2, (side - size[1]) // 2
    images = functional.pad(images, (left, side - size[1] - left, above, side - size[0] - above))
    mean, std = (torch.tensor(values).to(images).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def _cached() -> str:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(REPOSITORY, FILE)
    if not isinstance(found, str):
        raise RewardError(
            f"HPSv2.1's weights are not in the Hugging Face cache: `hf download {REPOSITORY} {FILE}` fetches them, or "
            "pass their file."
        )
    return found
