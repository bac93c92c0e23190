"""HPSv2 (Wu et al., 2023, arXiv 2306.09341): a CLIP ViT-H/14 fine-tuned on human preferences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import RewardError
from trajsurgery.rewards.contract import Reward, checkpoint_layers
from trajsurgery.rewards.preprocessing import normalize, resize_and_pad
from trajsurgery.rewards.weight_files import find_file, load_part

REPOSITORY = "xswu/HPSv2"
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(Reward):
    """The cosine of CLIP's image and text embeddings; logit_scale is not applied, as in the official evaluation.

    `reward(images, prompts)` takes images Float[batch 3 h w] in [0, 1] of any size and a text for each, and returns
    Float[batch] in [-1, 1]: FLUX.1-dev scores about 0.31, tuned models up to about 0.41. As in the official evaluation
    the longer side is resized to the model's (bicubic, antialiased), and the rest is zero before the normalisation.

    Args:
        file: `HPS_v2.1_compressed.pt`; that of the local Hugging Face cache if left out.
        model: the open_clip configuration.
        version: 2.1, or 2.0, the older weights; the paper's numbers are for 2.1.
        checkpointing: recomputes the image tower's layers in the backward pass.

    Raises:
        RewardError: no weights, or not these; what the contract says.
    """

    scale = "cosine, in [-1, 1]"
    threshold = 0.55
    """lambda of the paper (section 6.1): above what is reached, so that the hinge never closes."""
    alpha, learning_rate = 0.3, 1e-5
    source = "https://github.com/tgxs002/HPSv2, arXiv 2306.09341"
    licence = "Apache-2.0"

    def __init__(
        self, file: str | None = None, model: str = "ViT-H-14", version: str = "2.1", checkpointing: bool = False
    ) -> None:
        import open_clip

        super().__init__()
        if version not in FILES:
            raise RewardError(f"there is no HPSv2 of version {version!r}: it is {' or '.join(FILES)}.")
        self.name = f"hpsv{version}"
        path = find_file(f"HPSv{version}", file, REPOSITORY, FILES[version])
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.clip: Any = open_clip.create_model(model)
        load_part(path, self.clip, saved.get("state_dict", {}), f"the weights of HPSv{version} ({model})")
        self.tokenizer = open_clip.get_tokenizer(model)
        self.side = int(self.clip.visual.image_size[0])
        if checkpointing:
            checkpoint_layers(self.clip.visual.transformer.resblocks)
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        weight: Tensor = self.clip.text_projection
        with torch.no_grad():
            texts = self.clip.encode_text(self.tokenizer(prompts).to(weight.device), normalize=True)
        pixels = preprocess(images.to(weight), self.side)
        return (self.clip.encode_image(pixels, normalize=True) * texts).sum(-1)


def preprocess(images: Tensor, side: int) -> Tensor:
    """Resize the longer side to `side`, pad with zeros, then apply CLIP's normalisation: Float[batch 3 side side]."""
    return normalize(resize_and_pad(images, side))
