"""PickScore, CLIPScore and the aesthetic predictor on a small CLIP, against transformers' processor and model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from benchmarks.world.tokenizers import clip_tokenizer
from tests.tolerances import EXACT, STOCK, VALUE
from trajsurgery import RewardError
from trajsurgery.rewards.clip import CLIP, Aesthetic, CLIPScore, PickScore
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.preprocessing import MEAN, STD, floor_offset, normalize, resize_and_crop

TEXTS = ["a red circle", "two blue squares above a green star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, in the folder that save_pretrained writes."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    words = clip_tokenizer(folder)
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**size, **marks, "vocab_size": len(words), "max_position_embeddings": 12, "hidden_act": "gelu"},
        vision_config={**size, "image_size": 28, "patch_size": 14, "hidden_act": "gelu"},
        projection_dim=16,
        initializer_factor=10.0,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five linear layers of LAION's file under its names: dropouts count in the numbering."""
    torch.manual_seed(1)
    layers = nn.Sequential(
        *(nn.Linear(16, 32), nn.Dropout(0.2), nn.Linear(32, 24), nn.Dropout(0.2), nn.Linear(24, 12), nn.Dropout(0.1)),
        *(nn.Linear(12, 6), nn.Linear(6, 1)),
    )
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, path)
    assert "layers.7.bias" in torch.load(path)
    return path


def images(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.1 + 0.8 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def cosines(folder: Path, pixels: Tensor, factor: bool = False) -> Tensor:
    """The authors' example with transformers' forward pass, which scales by exp(logit_scale); divided by it without
    `factor`.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
    return logits if factor else logits / model.logit_scale.exp().detach()


@pytest.mark.parametrize("size", [(28, 28), (40, 40), (31, 60), (77, 30), (5, 4), (300, 401)])
def test_pickscore_is_transformers_model_on_the_center_crop(folder: Path, size: tuple[int, int]) -> None:
    reward, pixels = PickScore(folder), images(*size)
    expected = cosines(folder, normalize(resize_and_crop(pixels, 28, floor_offset)))
    torch.testing.assert_close(reward(pixels, TEXTS), expected, rtol=VALUE[torch.float32], atol=VALUE[torch.float32])
    raw = PickScore(folder, raw=True)
    torch.testing.assert_close(
        raw(pixels, TEXTS), cosines(folder, normalize(resize_and_crop(pixels, 28, floor_offset)), True)
    )
    assert raw.threshold == pytest.approx(0.4 * raw.factor)
    assert (reward.threshold, reward.alpha, reward.learning_rate, raw.name) == (0.4, 0.1, 1e-5, "pickscore raw")


@pytest.mark.parametrize("size", [(28, 28), (40, 40), (31, 60), (77, 30), (300, 401)])
def test_pixels_are_those_of_transformers_processor(size: tuple[int, int]) -> None:
    """PickScore was trained with the processor on arrays, which rounds bytes twice (test_pixels.py)."""
    # PIL's is the only one in transformers 5.0.
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    raw = (images(*size)[:1] * 255).round().to(torch.uint8)
    processor = kind(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    picture = Image.fromarray(raw[0].permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.asarray(processor(picture, return_tensors="np")["pixel_values"]))
    pixels = normalize(resize_and_crop(raw.float() / 255, 28, floor_offset))
    assert tuple(processor.image_mean) == pytest.approx(MEAN)
    assert float((pixels - expected).abs().max()) * max(STD) * 255 < 2.5


def rewards(folder: Path, head: Path) -> dict[str, Reward]:
    return {
        "pickscore": PickScore(folder, checkpointing=True),
        "pickscore raw": PickScore(folder, raw=True),
        "clipscore": CLIPScore(folder),
        "aesthetic": Aesthetic(head, folder),
    }


@pytest.mark.parametrize("name", ["pickscore", "pickscore raw", "clipscore", "aesthetic"])
def test_the_gradient_agrees_with_finite_differences(folder: Path, head: Path, name: str) -> None:
    reward = rewards(folder, head)[name].double()
    assert reward.name == name
    pixels = images(31, 44, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, TEXTS).sum(), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        ahead, back = (reward(pixels + sign * 1e-5 * direction, TEXTS) for sign in (1, -1))
    analytic = (gradient * direction).sum((1, 2, 3))
    assert float((analytic - (ahead - back) / 2e-5).norm()) <= STOCK * float(analytic.norm())
    assert not any(p.requires_grad for p in reward.parameters())
    assert not any(module.training for module in reward.modules())


def test_the_head_is_the_product_of_its_layers(folder: Path, head: Path) -> None:
    """Without activations the five layers are one affine map."""
    reward, state = Aesthetic(head, folder).double(), torch.load(head)
    matrix, offset = torch.eye(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    for n in (0, 2, 4, 6, 7):
        weight = state[f"layers.{n}.weight"].double()
        matrix, offset = weight @ matrix, weight @ offset + state[f"layers.{n}.bias"].double()
    pixels = images(28, 28, dtype=torch.float64)
    unit = reward.clip.images(pixels)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, dtype=torch.float64), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(reward(pixels, TEXTS), (unit @ matrix.T + offset)[:, 0], rtol=1e-12, atol=EXACT)
    assert torch.equal(reward(pixels, TEXTS), reward(pixels, ["", ""]))


def test_a_head_of_one_layer(folder: Path, tmp_path: Path) -> None:
    layer = nn.Linear(16, 1)
    torch.save(layer.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    reward = Aesthetic(tmp_path / "sa_0_4_vit_l_14_linear.pth", folder)
    pixels = images(28, 28)
    assert torch.equal(reward(pixels, TEXTS), layer(reward.clip.images(pixels))[:, 0].detach())


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda state: {},
        lambda state: {**state, "layers.1.scale": torch.ones(32)},
        lambda state: {k: v for k, v in state.items() if "7" not in k},
        lambda state: {k: v for k, v in state.items() if k != "layers.2.bias"},
        lambda state: {k: v for k, v in state.items() if not k.startswith("layers.2")},
    ],
)
def test_a_head_of_other_layers_is_refused(folder: Path, head: Path, tmp_path: Path, corrupt: object) -> None:
    torch.save(corrupt(torch.load(head)), tmp_path / "corrupted.pth")  # type: ignore[operator]
    with pytest.raises(RewardError, match="not the linear layers of its head"):
        Aesthetic(tmp_path / "corrupted.pth", folder)


def test_missing_files_and_wrong_weights_are_named(folder: Path, head: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(RewardError, match="hf download yuvalkirstain/PickScore_v1"):
        PickScore()
    with pytest.raises(RewardError, match="hf download openai/clip-vit-large-patch14"):
        CLIPScore()
    with pytest.raises(RewardError, match=r"hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth"):
        Aesthetic()
    with pytest.raises(RewardError, match=r"has no config.json"):
        CLIPScore(tmp_path)
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 of CLIP's weights, visual_projection.weight"):
        CLIP("CLIPScore", tmp_path, floor_offset)
    state = load_file(folder / "model.safetensors") | {"score_head.weight": torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"holds 1 weights that are not CLIP's, such as score_head.weight"):
        CLIP("CLIPScore", tmp_path, floor_offset)
    position_ids = {f"{part}_model.embeddings.position_ids": torch.arange(3)[None] for part in ("vision", "text")}
    state = load_file(folder / "model.safetensors") | position_ids
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    CLIP("CLIPScore", tmp_path, floor_offset, folder)
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match="hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        PickScore(tmp_path)
    assert PickScore(tmp_path, tokenizer=folder)(images(28, 28), TEXTS).shape == (2,)


@pytest.mark.parametrize("name", ["clipscore", "aesthetic"])
def test_checkpointing_changes_no_bit_of_the_gradient(folder: Path, head: Path, name: str) -> None:
    gradients: list[Tensor] = []
    saved_sizes: list[list[int]] = [[], []]
    for on in (False, True):
        reward = CLIPScore(folder, on) if name == "clipscore" else Aesthetic(head, folder, on)
        pixels, sizes = images(40, 31).requires_grad_(), saved_sizes[on]

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            scores = reward(pixels, TEXTS)
        gradients.append(torch.autograd.grad(scores.sum(), pixels)[0])
    assert torch.equal(*gradients)
    assert sum(saved_sizes[True]) < sum(saved_sizes[False])
