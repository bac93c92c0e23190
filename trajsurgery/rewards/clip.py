"""CLIP in transformers' form, and three rewards on it: PickScore, CLIPScore and the aesthetic predictor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trajsurgery.errors import RewardError
from trajsurgery.rewards.contract import Reward, checkpoint_layers
from trajsurgery.rewards.preprocessing import floor_offset, normalize, resize_and_crop, round_offset
from trajsurgery.rewards.weight_files import find_file, find_folder, linear_head

LARGE = "openai/clip-vit-large-patch14"


class CLIP(nn.Module):
    """A frozen `CLIPModel` and its tokenizer: unit embeddings of images, differentiable, and of texts.

    Args:
        reward: whose it is, for errors.
        model: a folder that `save_pretrained` wrote, or a hub id that is in the local cache.
        corner: of the centre crop, see `resize_and_crop`.
        tokenizer: where the tokenizer is, if not beside the model.
        checkpointing: recomputes the image tower's layers in the backward pass.
    """

    def __init__(
        self,
        reward: str,
        model: str | Path,
        corner: Callable[[int], int],
        tokenizer: str | Path | None = None,
        checkpointing: bool = False,
    ) -> None:
        from transformers import AutoTokenizer, CLIPModel

        super().__init__()
        folder = find_folder(reward, model)
        loaded: Any = CLIPModel.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        self.model: Any = loaded[0]
        lacking = sorted((*loaded[1]["missing_keys"], *map(str, loaded[1]["mismatched_keys"])))
        if lacking:
            raise RewardError(f"{reward}: {folder} lacks {len(lacking)} of CLIP's weights, {lacking[0]} among them.")
        spare = sorted(key for key in loaded[1]["unexpected_keys"] if not key.endswith(".position_ids"))
        if spare:  # position ids are counted, not learnt: files of old versions hold them
            raise RewardError(f"{reward}: {folder} holds {len(spare)} weights that are not CLIP's, such as {spare[0]}.")
        words = find_folder(reward, tokenizer or folder, "tokenizer_config.json")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(words), local_files_only=True)
        self.side, self.corner = int(self.model.config.vision_config.image_size), corner
        self.length = int(self.model.config.text_config.max_position_embeddings)
        if checkpointing:
            checkpoint_layers(self.model.vision_model.encoder.layers)

    def images(self, images: Tensor, rounded: bool = False) -> Tensor:
        """Float[batch dim], of images in [0, 1] of any size; `rounded`: see `pil_resize`."""
        weight: Tensor = self.model.visual_projection.weight
        pixels = normalize(resize_and_crop(images.to(weight), self.side, self.corner, rounded))
        return functional.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def texts(self, prompts: list[str]) -> Tensor:
        """Float[batch dim], of texts, cut at CLIP's length."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        inputs = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return functional.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)

    def cosines(self, images: Tensor, prompts: list[str], rounded: bool = False) -> Tensor:
        """Float[batch], of each image and its text."""
        return (self.images(images, rounded) * self.texts(prompts)).sum(-1)


class PickScore(Reward):
    """PickScore (Kirstain et al., 2023, arXiv 2305.01569): a CLIP ViT-H/14 fine-tuned on users' choices.

    The cosine, or with `raw` the scale that the authors print: exp(logit_scale) = 100 times as much. The lambda of the
    paper can only be meant for the cosine. The shorter side is resized to 224, the middle cut out.

    Args:
        model: a folder, or a hub id in the local cache.
        tokenizer: the same; left out, the model's own, else that of LAION's ViT-H-14, as in the authors' example.
        raw: exp(logit_scale) * cosine.
        checkpointing: recomputes the image tower's layers in the backward pass.
    """

    name = "pickscore"
    scale = "cosine, in [-1, 1]: good pictures have 0.20 to 0.26"
    threshold = 0.4
    """lambda of the paper (section 6.1), times exp(logit_scale) for `raw`."""
    alpha, learning_rate = 0.1, 1e-5
    source = "https://github.com/yuvalkirstain/PickScore, arXiv 2305.01569"
    licence = (
        "none in the authors' repository: see the card of yuvalkirstain/PickScore_v1; MIT (LAION's CLIP, its base)"
    )

    def __init__(
        self,
        model: str | Path = "yuvalkirstain/PickScore_v1",
        tokenizer: str | Path | None = None,
        raw: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer is None and not (find_folder("PickScore", model) / "tokenizer_config.json").is_file():
            tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        self.clip = CLIP("PickScore", model, floor_offset, tokenizer, checkpointing)
        self.factor = float(self.clip.model.logit_scale.detach().exp()) if raw else 1.0
        if raw:
            self.name, self.scale = "pickscore raw", "exp(logit_scale) * cosine: good pictures have 20 to 26"
            self.threshold = 0.4 * self.factor
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.factor * self.clip.cosines(images, prompts, self.rounded)


class CLIPScore(Reward):
    """The cosine of CLIP ViT-L/14 (after Hessel et al., 2021, arXiv 2104.08718).

    Neither the paper's factor of 2.5 nor its max(0, .), which stops the gradient, nor its "A photo depicts".

    Args:
        model: a folder, or a hub id in the local cache; any CLIP in transformers' form.
        checkpointing: recomputes the image tower's layers in the backward pass.
    """

    name = "clipscore"
    scale = "cosine, in [-1, 1]: fitting pictures have 0.2 to 0.35"
    source = "https://github.com/openai/CLIP, arXiv 2103.00020 and 2104.08718"
    licence = "MIT"

    def __init__(self, model: str | Path = LARGE, checkpointing: bool = False) -> None:
        super().__init__()
        self.clip = CLIP("CLIPScore", model, round_offset, checkpointing=checkpointing)
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.clip.cosines(images, prompts, self.rounded)


class Aesthetic(Reward):
    """LAION's aesthetic predictor: a head of linear layers on the unit image embedding of CLIP ViT-L/14.

    It does not look at the prompts, and is easily hacked: mix it with another (`Weighted`).

    Args:
        head: `sac+logos+ava1-l14-linearMSE.pth` (five layers) or `sa_0_4_vit_l_14_linear.pth` (one); left out, the
            former from the local cache of trl-lib/ddpo-aesthetic-predictor.
        model: CLIP ViT-L/14, a folder, or a hub id in the local cache.
        checkpointing: recomputes the image tower's layers in the backward pass.
    """

    name = "aesthetic"
    scale = "a mark, about 1 to 10: photographs have 5 to 6"
    source = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
    licence = "Apache-2.0 (head), MIT (CLIP)"

    def __init__(self, head: str | Path | None = None, model: str | Path = LARGE, checkpointing: bool = False) -> None:
        super().__init__()
        path = find_file("Aesthetic", head, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
        self.clip = CLIP("Aesthetic", model, round_offset, checkpointing=checkpointing)
        width = int(self.clip.model.config.projection_dim)
        self.head = linear_head("Aesthetic", torch.load(path, map_location="cpu", weights_only=True), width)
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.clip.images(images, self.rounded)).squeeze(-1)
