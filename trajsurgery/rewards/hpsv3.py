"""HPSv3 (Ma et al., 2025, arXiv 2508.03789): Qwen2-VL-7B with a head that regresses a preference, differentiable."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RewardError
from trajsurgery.rewards import weight_files
from trajsurgery.rewards.contract import Reward, checkpoint_layers
from trajsurgery.rewards.preprocessing import normalize, pil_resize
from trajsurgery.rewards.weight_files import find_file, find_folder

PATCH, MERGED = 14, 2
"""The side of a patch, and how many of them a token spans in each direction."""

AREA = 256 * (PATCH * MERGED) ** 2
"""Pixels of an image as the model sees it, about: the original's min_pixels and max_pixels."""

VISION: dict[str, Any] = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4}
TEXT: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
"""Qwen2-VL-7B-Instruct. The size of the vocabulary is the file's: its authors cut it after their own token."""

NAMES = ((r"^model\.", "text."), (r"^visual\.", "visual."), (r"^rm_head\.", "head."))
"""Names of the original's weights (transformers 4.45's), and of ours. Its lm_head is not looked at."""

rename_weights = functools.partial(weight_files.rename_weights, "HPSv3", NAMES, r"^lm_head\.weight$")

QUESTION = Path(__file__).with_name("hpsv3_question.txt").read_text("utf-8")
"""The authors' question, word for word, from the package hpsv3 (MIT License, Copyright (c) 2024 HPSv3 Team)."""

REWARD = "<|Reward|>"
"""The token added to Qwen2-VL's vocabulary, whose hidden state the head reads."""

IMAGE = "<|image_pad|>"
"""The token for one patch of the image."""

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{image}"
    "<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen2-VL-Instruct's chat format."""


class HPSv3(Reward):
    """The mean that the head gives at the token <|Reward|>, after the image and the authors' question.

    The image is resized to about 200,704 pixels whose sides are multiples of 28, bicubic; every side ratio up to 200
    is taken. Like the original's forward pass, and unlike Qwen2-VL's own, it numbers all tokens one by one, those of
    the image too. The original resizes bytes and rounds them; `rounded` does the same. Without it scores of a small
    model with random weights differ by 5e-5 (a huge picture) to 6e-3 (a tall one) of their value, with it by 2e-6.

    Args:
        file: `HPSv3.safetensors`; that of the local Hugging Face cache if left out.
        tokenizer: Qwen2-VL's, a folder, or a hub id in the local cache.
        vision: what differs from the configuration of Qwen2-VL-7B's image tower.
        text: the same for its text tower.
        dtype: of the towers; the head is float32, as in the original. 7B parameters in float32 take 31 GiB.
        checkpointing: recomputes the layers in the backward pass.

    Raises:
        RewardError: no weights, or not these; images longer than 200 times their width; prompts that hold the model's
            own marks; what the contract says.
    """

    name = "hpsv3"
    scale = "unbounded, higher is better: FLUX.1-dev has 13.5 on HPDv2's prompts and 10.8 on MJHQ's"
    threshold = 13.5
    """lambda of the paper (section 6.1)."""
    alpha, learning_rate = 0.1, 8e-6
    source = "https://github.com/MizzenAI/HPSv3, arXiv 2508.03789"
    licence = "MIT (HPSv3), Apache-2.0 (Qwen2-VL-7B-Instruct)"

    def __init__(
        self,
        file: str | Path | None = None,
        tokenizer: str | Path = "Qwen/Qwen2-VL-7B-Instruct",
        vision: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        checkpointing: bool = False,
    ) -> None:
        from transformers import AddedToken, AutoTokenizer

        super().__init__()
        path = find_file("HPSv3", file, "MizzenAI/HPSv3", "HPSv3.safetensors")
        words = find_folder("HPSv3", tokenizer, "tokenizer_config.json")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(words), local_files_only=True)
        self.tokenizer.add_tokens([AddedToken(REWARD, special=True)], special_tokens=True)
        state = rename_weights(_read(path))
        self.visual, self.text, self.head = build_parts(state, vision or {}, text or {})
        for part, name, kind in ((self.visual, "visual", dtype), (self.text, "text", dtype), (self.head, "head", None)):
            weights = weight_files.weights_under(state, f"{name}.")
            weights = {key: value.to(kind or torch.float32) for key, value in weights.items()}
            weight_files.load_part(path, part, weights, f"HPSv3's weights ({name}.*)", assign=True)
        if len(self.tokenizer) > self.text.config.vocab_size:
            raise RewardError(
                f"{path.name} knows {self.text.config.vocab_size} tokens and {words} has {len(self.tokenizer)} with "
                f"{REWARD}: it is another tokenizer than Qwen2-VL-7B-Instruct's."
            )
        if checkpointing:
            checkpoint_layers((*self.visual.blocks, *self.text.layers))
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.outputs(images, prompts)[:, 0]

    def outputs(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Float[batch 2]: the mean, and the logarithm of the deviation, as the head gives them."""
        first: Tensor = self.head[0].weight
        pixels = preprocess(images.to(first), self.rounded)
        grid = [1, pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH]
        ids = self.tokens(prompts, grid[1] * grid[2] // MERGED**2).to(first.device)
        seen = self.visual(
            patches(pixels).to(self.visual.get_dtype()), grid_thw=torch.tensor([grid] * len(ids), device=first.device)
        ).pooler_output
        words = self.text.embed_tokens(ids)
        whole = words.masked_scatter((ids == self._token(IMAGE))[..., None], seen.to(words))
        # no mask: attention looks back alone, and the padding is at the end; positions count from 0 if none are given
        hidden = self.text(inputs_embeds=whole, use_cache=False).last_hidden_state
        at = (ids == self._token(REWARD)).int().argmax(-1)
        with torch.autocast(first.device.type, enabled=False):
            return self.head(hidden[torch.arange(len(ids)), at].to(first))

    def tokens(self, prompts: list[str], count: int) -> Tensor:
        """Int[batch length]: the question about each prompt after `count` tokens of the image, padded at the end."""
        questions = [CHAT.format(image=IMAGE * count, question=QUESTION.replace("{prompt}", p)) for p in prompts]
        padded = self.tokenizer(questions, padding=True, padding_side="right", return_tensors="pt")
        tokens: Tensor = padded["input_ids"]
        for prompt, row in zip(prompts, tokens):
            if int((row == self._token(IMAGE)).sum()) != count or int((row == self._token(REWARD)).sum()) != 1:
                raise RewardError(
                    f"hpsv3: the prompt {prompt!r} holds {IMAGE} or {REWARD}, marks of the model: drop it."
                )
        return tokens

    def _token(self, name: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(name))


def target_size(height: int, width: int) -> tuple[int, int]:
    """Return the size an image is resized to: nearly its ratio, in multiples of 28 whose product is about `AREA`.

    Raises:
        RewardError: a side is more than 200 times the other, before or after.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    try:
        size: tuple[int, int] = smart_resize(height, width, PATCH * MERGED, AREA, AREA)
        smart_resize(*size)  # raises if the rounded size is too narrow
    except ValueError as error:
        raise RewardError(f"hpsv3: images of {height} x {width} are too narrow: it takes sides of 1 to 200.") from error
    return size


def preprocess(images: Tensor, rounded: bool = False) -> Tensor:
    """Resized to the model's size and normalised: Float[batch 3 h w]."""
    return normalize(pil_resize(images, *target_size(*images.shape[-2:]), rounded))


def patches(pixels: Tensor) -> Tensor:
    """Float[tokens * 4, 3 * 2 * 14 * 14], row by row of tokens, the 4 patches of a token together.

    A patch has two frames, since the model takes videos: those of a still image are the same.
    """
    batch, colours, height, width = pixels.shape
    rows, columns = height // PATCH // MERGED, width // PATCH // MERGED
    split = pixels.view(batch, colours, rows, MERGED, PATCH, columns, MERGED, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = split.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return frames.reshape(batch * rows * columns * MERGED**2, -1)


def build_parts(
    state: Mapping[str, Tensor], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> tuple[Any, Any, Any]:
    """Build transformers' two towers and the head without weights, on the meta device except for their tables.

    Args:
        state: its embedding gives the number of tokens.
    """
    from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl

    if "text.embed_tokens.weight" not in state:
        raise RewardError("HPSv3: the file has no model.embed_tokens.weight: it is not HPSv3.safetensors.")
    vocabulary = {"vocab_size": len(state["text.embed_tokens.weight"]), "bos_token_id": None, "eos_token_id": None}
    configs: Any = configuration_qwen2_vl
    models: Any = modeling_qwen2_vl
    image_config = configs.Qwen2VLVisionConfig(**{**VISION, **vision})
    text_config = configs.Qwen2VLTextConfig(**{**TEXT, **text, **vocabulary})
    with torch.device("meta"):
        image_tower = models.Qwen2VisionTransformerPretrainedModel._from_config(image_config)
        text_tower = models.Qwen2VLTextModel._from_config(text_config)
        first, second = nn.Linear(int(text_config.hidden_size), 1024), nn.Linear(1024, 16)
        head = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), second, nn.ReLU(), nn.Linear(16, 2))
    # what is computed and not stored
    rotary = type(image_tower.rotary_pos_emb)
    takes_config = "config" in inspect.signature(rotary).parameters  # older ones take half of a head's width
    half = image_config.embed_dim // image_config.num_heads // 2
    image_tower.rotary_pos_emb = rotary(image_config if takes_config else half)
    text_tower.rotary_emb = type(text_tower.rotary_emb)(config=text_config)
    return image_tower, text_tower, head


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state.get("model", state)
