"""ImageReward on a small BLIP: a checkpoint in the original's format, scored by the reward and by plain formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tests.tolerances import STOCK, VALUE
from trajsurgery import RewardError
from trajsurgery.rewards.imagereward import ImageReward, build_towers, rename_weights
from trajsurgery.rewards.preprocessing import normalize, resize_and_crop, round_offset

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "two", "red", "##s"]
TEXTS = ["a red cat", "two dogs"]
HEADS = {"vision": 4, "text": 2}
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_VISION |= {"image_size": 32}
SMALL_TEXT = {"hidden_size": 12, "encoder_hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL_TEXT |= {"num_attention_heads": 2, "vocab_size": len(WORDS), "max_position_embeddings": 40}


def layout(vision: Mapping[str, int], text: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original's file, derived from its modules: BLIP's ViT, its BERT, and five layers."""
    v, t, shapes = vision["hidden_size"], text["hidden_size"], dict[str, tuple[int, ...]]()

    def layer(name: str, out: int, into: int | None = None) -> None:
        shapes[f"{name}.weight"] = (out,) if into is None else (out, into)
        shapes[f"{name}.bias"] = (out,)

    vit, bert = "blip.visual_encoder.", "blip.text_encoder."
    shapes[f"{vit}cls_token"], patches = (1, 1, v), (vision["image_size"] // 16) ** 2
    shapes[f"{vit}pos_embed"] = (1, patches + 1, v)
    shapes[f"{vit}patch_embed.proj.weight"], shapes[f"{vit}patch_embed.proj.bias"] = (v, 3, 16, 16), (v,)
    for n in range(vision["num_hidden_layers"]):
        layer(f"{vit}blocks.{n}.norm1", v)
        layer(f"{vit}blocks.{n}.attn.qkv", 3 * v, v)
        layer(f"{vit}blocks.{n}.attn.proj", v, v)
        layer(f"{vit}blocks.{n}.norm2", v)
        layer(f"{vit}blocks.{n}.mlp.fc1", 4 * v, v)
        layer(f"{vit}blocks.{n}.mlp.fc2", v, 4 * v)
    layer(f"{vit}norm", v)
    shapes[f"{bert}embeddings.position_ids"] = (1, text["max_position_embeddings"])
    shapes[f"{bert}embeddings.word_embeddings.weight"] = (text["vocab_size"], t)
    shapes[f"{bert}embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], t)
    layer(f"{bert}embeddings.LayerNorm", t)
    for n in range(text["num_hidden_layers"]):
        for part, width in (("attention", t), ("crossattention", v)):
            layer(f"{bert}encoder.layer.{n}.{part}.self.query", t, t)
            layer(f"{bert}encoder.layer.{n}.{part}.self.key", t, width)
            layer(f"{bert}encoder.layer.{n}.{part}.self.value", t, width)
            layer(f"{bert}encoder.layer.{n}.{part}.output.dense", t, t)
            layer(f"{bert}encoder.layer.{n}.{part}.output.LayerNorm", t)
        layer(f"{bert}encoder.layer.{n}.intermediate.dense", text["intermediate_size"], t)
        layer(f"{bert}encoder.layer.{n}.output.dense", t, text["intermediate_size"])
        layer(f"{bert}encoder.layer.{n}.output.LayerNorm", t)
    layer("blip.vision_proj", 256, v)
    layer("blip.text_proj", 256, t)
    widths = [t, 1024, 128, 64, 16, 1]
    for number, (into, out) in zip((0, 2, 4, 6, 7), pairwise(widths)):
        layer(f"mlp.layers.{number}", out, into)
    return shapes


def test_the_full_size_model_uses_every_name() -> None:
    """Names and shapes of ImageReward.pt, 24 + 12 layers, on the meta device."""
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 224}
    text = {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 30524, "intermediate_size": 3072}
    shapes = layout(vision, text | {"max_position_embeddings": 512})
    with torch.device("meta"):
        renamed = rename_weights({name: torch.empty(shape) for name, shape in shapes.items()})
        vit, bert = build_towers({}, {})
    ours = {f"vision.{k}": v.shape for k, v in vit.state_dict().items()}
    ours |= {f"text.{k}": v.shape for k, v in bert.state_dict().items()}
    loaded = {k: v.shape for k, v in renamed.items() if not k.startswith("head.")}
    assert loaded == ours
    assert len(shapes) - len(renamed) == 5  # two projections and the position ids
    assert vit.config.num_attention_heads == 16
    assert bert.config.num_attention_heads == 12


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("position_ids"):
            return torch.arange(shape[1])[None]
        noise = torch.randn(shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            return 1 + 0.2 * noise
        return noise * (0.3 if len(shape) < 2 else 1.5 / math.sqrt(shape[-1]))

    return {name: draw(name, shape) for name, shape in layout(SMALL_VISION, SMALL_TEXT).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("imagereward")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    torch.save(state, folder / "ImageReward.pt")
    return folder


def small_reward(folder: Path, **further: Any) -> ImageReward:
    return ImageReward(folder / "ImageReward.pt", folder, SMALL_VISION, SMALL_TEXT, **further)


def images(*size: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Formulas:
    """The original's forward pass as formulas on its weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, epsilon: float) -> Tensor:
        spread = (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
        return (x - x.mean(-1, keepdim=True)) / spread * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
        parts: list[Tensor] = []
        for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
            logits = a @ b.transpose(1, 2) / math.sqrt(a.shape[-1])
            parts.append((logits if seen is None else logits.masked_fill(~seen[:, None], -1e9)).softmax(-1) @ c)
        return torch.cat(parts, -1)

    def vit(self, pixels: Tensor) -> Tensor:
        s, p = self.state, "blip.visual_encoder."
        patches = F.unfold(pixels, 16, stride=16).transpose(1, 2)
        x = patches @ s[f"{p}patch_embed.proj.weight"].flatten(1).T + s[f"{p}patch_embed.proj.bias"]
        x = torch.cat([s[f"{p}cls_token"].expand(len(x), 1, -1), x], 1) + s[f"{p}pos_embed"]
        for n in range(2):
            q, k, v = self.linear(f"{p}blocks.{n}.attn.qkv", self.norm(f"{p}blocks.{n}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{p}blocks.{n}.attn.proj", self.attend(q, k, v, HEADS["vision"]))
            inner = F.gelu(self.linear(f"{p}blocks.{n}.mlp.fc1", self.norm(f"{p}blocks.{n}.norm2", x, 1e-6)))
            x = x + self.linear(f"{p}blocks.{n}.mlp.fc2", inner)
        return self.norm(f"{p}norm", x, 1e-6)

    def bert(self, tokens: Tensor, image: Tensor) -> Tensor:
        s, p = self.state, "blip.text_encoder."
        x = s[f"{p}embeddings.word_embeddings.weight"][tokens]
        x = x + s[f"{p}embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = self.norm(f"{p}embeddings.LayerNorm", x, 1e-12)
        for n in range(2):
            at = f"{p}encoder.layer.{n}."
            for part, other, seen in (("attention", None, tokens != 0), ("crossattention", image, None)):
                to = x if other is None else other
                q, k, v = (
                    self.linear(f"{at}{part}.self.{name}", y) for name, y in (("query", x), ("key", to), ("value", to))
                )
                out = self.linear(f"{at}{part}.output.dense", self.attend(q, k, v, HEADS["text"], seen))
                x = self.norm(f"{at}{part}.output.LayerNorm", out + x, 1e-12)
            inner = F.gelu(self.linear(f"{at}intermediate.dense", x))
            x = self.norm(f"{at}output.LayerNorm", self.linear(f"{at}output.dense", inner) + x, 1e-12)
        return x[:, 0]

    def score(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        x = self.bert(tokens, self.vit(pixels))
        for number in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{number}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def padded(*rows: list[int]) -> Tensor:
    return torch.tensor([row + [0] * (35 - len(row)) for row in rows])


@pytest.mark.parametrize("size", [(32, 32), (50, 50), (33, 70), (91, 40), (4, 5), (300, 401)])
def test_the_score_is_the_original_s_formula(folder: Path, state: dict[str, Tensor], size: tuple[int, int]) -> None:
    pixels = images(*size)
    tokens = padded([2, 5, 9, 6, 3], [2, 8, 7, 10, 3])  # [CLS] a red cat [SEP], [CLS] two dog ##s [SEP]
    expected = Formulas(state).score(normalize(resize_and_crop(pixels, 32, round_offset)), tokens)
    double = small_reward(folder).double()(pixels, TEXTS)
    assert float((double - expected).norm()) <= VALUE[torch.float64] * float(expected.norm())
    single = small_reward(folder)(pixels.float(), TEXTS)
    assert float((single - expected).norm()) <= VALUE[torch.float32] * float(expected.norm())
    assert float(expected[0] - expected[1]) != 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_agrees_with_finite_differences(folder: Path, checkpointing: bool) -> None:
    reward, pixels = small_reward(folder, checkpointing=checkpointing).double(), images(37, 50).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, TEXTS).sum(), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        ahead, back = (reward(pixels + sign * 1e-5 * direction, TEXTS) for sign in (1, -1))
    analytic = (gradient * direction).sum((1, 2, 3))
    assert float((analytic - (ahead - back) / 2e-5).norm()) <= STOCK * float(analytic.norm())
    assert not any(p.requires_grad for p in reward.parameters())
    assert not any(module.training for module in reward.modules())


def test_long_prompts_are_truncated(folder: Path) -> None:
    reward, pixels = small_reward(folder), images(32, 32)[:1].float()
    assert torch.equal(reward(pixels, ["a cat " * 40]), reward(pixels, ["a cat " * 60]))


def test_other_files_are_refused(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"hf download THUDM/ImageReward ImageReward.pt"):
        ImageReward()
    with pytest.raises(RewardError, match=r"hf download google-bert/bert-base-uncased"):
        ImageReward(folder / "ImageReward.pt")
    for change, message in (
        ({"blip.queue": torch.zeros(1)}, r"holds 'blip.queue'"),
        ({"blip.visual_encoder.norm.bias": None}, r"(?s)vision tower.*post_layernorm.bias"),
        ({"blip.text_encoder.embeddings.LayerNorm.bias": None}, r"(?s)text tower.*embeddings.LayerNorm.bias"),
        ({"mlp.layers.7.bias": None}, "linear layers of its head"),
    ):
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "ImageReward.pt")
        with pytest.raises(RewardError, match=message):
            ImageReward(tmp_path / "ImageReward.pt", folder, SMALL_VISION, SMALL_TEXT)
