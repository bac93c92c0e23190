"""ImageReward (Xu et al., 2023, arXiv 2304.05977): BLIP-large whose text attends to the image, and a linear head."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trajsurgery.rewards import weight_files
from trajsurgery.rewards.contract import Reward, checkpoint_layers
from trajsurgery.rewards.preprocessing import normalize, resize_and_crop, round_offset
from trajsurgery.rewards.weight_files import find_file, find_folder

CENTRE, SPREAD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's outputs: a score is (output - CENTRE) / SPREAD."""

LENGTH = 35
"""Tokens of a prompt: longer ones are cut, as in training."""

VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {"encoder_hidden_size": 1024, "num_attention_heads": 12}
"""BLIP-large as ImageReward has it: what differs from transformers' defaults."""

NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)
"""Names of the original's weights, and of ours."""

UNUSED = r"^blip\.(vision_proj|text_proj)\.|^blip\.text_encoder\.embeddings\.position_ids$"
"""What the original's file holds and its score does not look at."""

rename_weights = functools.partial(weight_files.rename_weights, "ImageReward", NAMES, UNUSED)


class ImageReward(Reward):
    """The head's output for the first token of BLIP's text encoder, standardised as the authors do.

    The shorter side is resized to 224, the middle cut out. Dropout is off and nothing is detached: the values are those
    of the original's `score`, the gradient that of its `score_gard`.

    Args:
        file: `ImageReward.pt`; that of the local Hugging Face cache if left out.
        tokenizer: BERT's, a folder, or a hub id in the local cache.
        vision: what differs from the configuration of BLIP-large's image tower.
        text: the same for its text tower.
        checkpointing: recomputes the layers in the backward pass.

    Raises:
        RewardError: no weights, or not these; what the contract says.
    """

    name = "imagereward"
    scale = "standardised: mean 0 and deviation 1 on the authors' data; FLUX.1-dev has about 1"
    source = "https://github.com/THUDM/ImageReward, arXiv 2304.05977"
    licence = "Apache-2.0"

    def __init__(
        self,
        file: str | Path | None = None,
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        vision: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        checkpointing: bool = False,
    ) -> None:
        from transformers import BertTokenizer

        super().__init__()
        path = find_file("ImageReward", file, "THUDM/ImageReward", "ImageReward.pt")
        words = find_folder("ImageReward", tokenizer, "tokenizer_config.json")
        self.tokenizer: Any = BertTokenizer.from_pretrained(str(words), local_files_only=True)
        self.vision, self.text = build_towers(vision or {}, text or {})
        state = rename_weights(torch.load(path, map_location="cpu", weights_only=True))
        head, self.side = weight_files.weights_under(state, "head."), int(self.vision.config.image_size)
        self.head = weight_files.linear_head("ImageReward", head, int(self.text.config.hidden_size))
        for tower, name in ((self.vision, "vision"), (self.text, "text")):
            weights = weight_files.weights_under(state, f"{name}.")
            weight_files.load_part(path, tower, weights, f"ImageReward's {name} tower")
        if checkpointing:
            checkpoint_layers((*self.vision.encoder.layers, *self.text.encoder.layer))
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        weight: Tensor = self.vision.embeddings.class_embedding
        pixels = normalize(resize_and_crop(images.to(weight), self.side, round_offset, self.rounded))
        cut = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **cut)
        hidden = self.text(
            input_ids=tokens["input_ids"].to(weight.device),
            attention_mask=tokens["attention_mask"].to(weight.device),
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
        ).last_hidden_state
        return (self.head(hidden[:, 0]).squeeze(-1) - CENTRE) / SPREAD


def build_towers(vision: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' BLIP parts of ImageReward's architecture: the image tower and the text tower."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    seen, read = BlipVisionConfig(**{**VISION, **vision}), BlipTextConfig(**{**TEXT, **text})
    return BlipVisionModel(seen), BlipTextModel(read, add_pooling_layer=False)
