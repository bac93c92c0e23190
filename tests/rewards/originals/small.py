"""Small models of the originals' architectures: sizes, weights, images, tokenizers, in the originals' formats.

This runs in the originals' environments too, so it imports only numpy, torch and PIL. numpy's RandomState gives the
same numbers in all versions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.rewards.originals import layouts

PROMPTS = ("a red cat", "two dogs", "a cat", "two red dogs", "a dog")
SIZES = {"square": (96, 96), "wide": (60, 200), "tall": (210, 80), "tiny": (5, 4), "huge": (1100, 1500)}

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 16, "head_width": 8, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PICK_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PICK_TEXT = {**PICK_VISION, "vocab_size": 54, "max_position_embeddings": 77}
PICK_VISION |= {"image_size": 224, "patch_size": 56}
JOINT = 768
"""CLIP in transformers' form; imscore's aesthetic head takes embeddings of 768."""

BLIP_VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BLIP_VISION |= {"image_size": 224}
BLIP_TEXT = {"hidden_size": 12, "encoder_hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
BLIP_TEXT |= {"num_attention_heads": 2, "vocab_size": 13, "max_position_embeddings": 40}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "two", "red", "##s"]

QWEN_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2}
QWEN_TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_TEXT |= {"num_key_value_heads": 1}
SECTIONS = [2, 2, 2]
"""How the 12 / 2 rotations of a head are divided among time, height and width."""

QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
QWEN_MARKS += ("<|video_pad|>",)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% for part in "
    "message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of Qwen2-VL-Instruct for one turn with images."""


def picture(name: str) -> np.ndarray:
    """Bytes [height, width, 3] of one of `SIZES`: waves and noise."""
    height, width = SIZES[name]
    random = np.random.RandomState(height * width)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(2 * math.pi * (a * y + b * x + c)) for a, b, c in random.uniform(0, 4, (3, 3))]
    noise = random.uniform(-0.3, 0.3, (height, width, 3))
    return np.clip(127.5 * (1 + 0.6 * np.stack(waves, -1) + noise), 0, 255).astype(np.uint8)


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """A random state dict of these shapes; its models give different images and prompts different scores."""
    random = np.random.RandomState(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("position_ids"):
            return torch.arange(shape[-1])[None]
        noise = torch.from_numpy(np.asarray(random.standard_normal(shape), dtype=np.float32))
        norm = ("norm", "ln_", "ln_q")
        if len(shape) == 1 and name.endswith("weight") and any(part in name.lower() for part in norm):
            return 1 + 0.2 * noise
        return noise * (0.3 if len(shape) < 2 else 1.5 / math.sqrt(math.prod(shape[1:]) or 1))

    return {name: draw(name, shape) for name, shape in sorted(shapes.items())}


def pictures(folder: Path) -> list[Path]:
    """Write one PNG of each size and return their paths."""
    paths = [folder / f"{name}.png" for name in SIZES]
    for path in paths:
        Image.fromarray(picture(path.stem)).save(path)
    return paths


def hpsv2(folder: Path) -> Path:
    """Write hps.pt in HPSv2's format, and its configuration small-hps.json."""
    (folder / "small-hps.json").write_text(json.dumps(CLIP))
    torch.save({"state_dict": weights(layouts.open_clip(CLIP), 1)}, folder / "hps.pt")
    return folder / "hps.pt"


def clip(folder: Path) -> Path:
    """Write a folder with CLIP in transformers' format; its tokenizer knows single letters."""
    from safetensors.torch import save_file

    folder = folder / "clip"
    folder.mkdir(exist_ok=True)
    letters = [chr(97 + i) + end for end in ("", "</w>") for i in range(26)]
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    vocabulary = {token: i for i, token in enumerate((*letters, *marks.values()))}
    ids = {f"{name}_id": vocabulary[token] for name, token in marks.items()} | {"pad_token_id": 53}
    config = {"model_type": "clip", "projection_dim": JOINT, "vision_config": {**PICK_VISION, "projection_dim": JOINT}}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {**PICK_TEXT, **ids}}))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    words = {**marks, "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps({**words, "tokenizer_class": "CLIPTokenizer"}))
    state = weights(layouts.clip(PICK_VISION, PICK_TEXT, JOINT), 4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def aesthetic(folder: Path) -> Path:
    """Write the aesthetic predictor's file."""
    torch.save(weights(layouts.aesthetic(), 5), folder / "aesthetic.pth")
    return folder / "aesthetic.pth"


def imagereward(folder: Path) -> Path:
    """Write ImageReward.pt, BERT's vocabulary and med_config.json."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    named = {k: v for k, v in BLIP_TEXT.items() if k != "encoder_hidden_size"}
    fixed = {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "add_cross_attention": True, "type_vocab_size": 2}
    fixed |= {"encoder_width": BLIP_TEXT["encoder_hidden_size"], "model_type": "bert", "pad_token_id": 0}
    (folder / "med_config.json").write_text(json.dumps(named | fixed))
    torch.save(weights(layouts.imagereward(BLIP_VISION, BLIP_TEXT), 2), folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


def hpsv3(folder: Path, question: str) -> Path:
    """Write HPSv3.safetensors, and Qwen2-VL's tokenizer with a vocabulary for the question into the folder `qwen`."""
    from safetensors.torch import save_file

    token_count = qwen_tokenizer(folder / "qwen", question)
    shapes = layouts.hpsv3(QWEN_VISION, QWEN_TEXT, token_count + 1)
    save_file(weights(shapes, 3), folder / "HPSv3.safetensors")
    return folder / "HPSv3.safetensors"


def qwen_tokenizer(folder: Path, question: str) -> int:
    """Write a tokenizer of the question's words and Qwen2-VL's special tokens; return its number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([question], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    count, plain = len(model["vocab"]), {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    marks: dict[str, Any] = {
        str(count + i): {"content": mark, "special": True, **plain} for i, mark in enumerate(QWEN_MARKS)
    }
    config = {"added_tokens_decoder": marks, "additional_special_tokens": list(QWEN_MARKS[1:]), "errors": "replace"}
    config |= {"add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None, "model_max_length": 32768}
    config |= {"chat_template": QWEN_TEMPLATE, "split_special_tokens": False, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return count + len(QWEN_MARKS)
