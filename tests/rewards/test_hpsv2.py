"""HPSv2.1 on a small open_clip model with random weights: scale, preprocessing, gradient, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tolerances import STOCK
from trajsurgery import RewardError
from trajsurgery.rewards import hpsv2
from trajsurgery.rewards.hpsv2 import HPSv2, preprocess
from trajsurgery.rewards.preprocessing import MEAN, STD

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a small open_clip model in the official format."""
    import open_clip

    folder = tmp_path_factory.mktemp("hps")
    (folder / "small-hps.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder / "small-hps.json")
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.create_model("small-hps").state_dict()}, folder / "weights.pt")
    return str(folder / "weights.pt")


@pytest.fixture(scope="module")
def reward(file: str) -> HPSv2:
    return HPSv2(file, "small-hps")


def images(*shape: int) -> Any:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def test_scores_are_cosines_and_differentiable(reward: HPSv2) -> None:
    pixels = images(2, 3, 40, 40).requires_grad_()
    scores = reward(pixels, ["a cat", "a dog"])
    assert scores.shape == (2,)
    assert bool((scores.abs() <= 1).all())
    (gradient,) = torch.autograd.grad(scores[0], pixels)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0
    assert not any(p.requires_grad for p in reward.parameters())
    assert reward.threshold == 0.55


def test_images_are_resized_by_their_longer_side_and_padded_with_black() -> None:
    pixels = preprocess(images(1, 3, 20, 40), 28)
    black = (torch.zeros(3) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert pixels.shape == (1, 3, 28, 28)
    for row in (0, 6, 21, 27):
        torch.testing.assert_close(pixels[0, :, row], black[:, None].expand(3, 28))
    assert not torch.allclose(pixels[0, :, 7], black[:, None].expand(3, 28))


@pytest.mark.parametrize("size", [(56, 56), (60, 90), (90, 60), (28, 28)])
def test_preprocessing_is_the_official_one_up_to_rounding(size: tuple[int, int]) -> None:
    """PIL's bicubic resize of uint8 images, padding, normalization."""
    raw = (images(*size, 3) * 255).round().to(torch.uint8)
    scale = 28 / max(size)
    height, width = round(size[0] * scale), round(size[1] * scale)
    small = Image.fromarray(raw.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    canvas = np.zeros((28, 28, 3), dtype=np.float32)
    top, left = (28 - height) // 2, (28 - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(small, dtype=np.float32) / 255
    expected = (canvas - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    pixels = preprocess(raw.permute(2, 0, 1)[None].float() / 255, 28)[0].permute(1, 2, 0)
    assert float((pixels - torch.from_numpy(expected)).abs().max()) < 0.02


def test_invalid_input_and_missing_weights_are_named(reward: HPSv2, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match="one string"):
        reward(images(2, 3, 28, 28), "a cat")
    with pytest.raises(RewardError, match="1 prompts"):
        reward(images(2, 3, 28, 28), ["a cat"])
    with pytest.raises(RewardError, match=r"\[2, 28, 28\]"):
        reward(images(2, 28, 28), ["a cat", "a dog"])
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(RewardError, match="hf download xswu/HPSv2"):
        hpsv2.HPSv2()


def test_versions_have_their_names_and_files(file: str, reward: HPSv2, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (reward.name, reward.alpha, reward.learning_rate, reward.licence) == ("hpsv2.1", 0.3, 1e-5, "Apache-2.0")
    older = HPSv2(file, "small-hps", version="2.0")
    assert older.name == "hpsv2.0"
    requested: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *arguments: requested.append(arguments) or file
    )
    HPSv2(model="small-hps")
    HPSv2(model="small-hps", version="2.0")
    assert requested == [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("xswu/HPSv2", "HPS_v2_compressed.pt")]
    with pytest.raises(RewardError, match=r"'3'.*2.0 or 2.1"):
        HPSv2(file, "small-hps", version="3")


def test_other_weights_are_refused(tmp_path: Path, file: str) -> None:
    state = torch.load(file)["state_dict"]
    torch.save({"state_dict": {k: v for k, v in state.items() if k != "visual.proj"}}, tmp_path / "less.pt")
    with pytest.raises(RewardError, match=r"(?s)less.pt does not hold.*visual.proj"):
        HPSv2(str(tmp_path / "less.pt"), "small-hps")
    with pytest.raises(
        RewardError, match=r"no file .*gone.pt\. It takes HPS_v2.1_compressed.pt of the hub's xswu/HPSv2"
    ):
        HPSv2(str(tmp_path / "gone.pt"))


@pytest.mark.parametrize("size", [(40, 40), (30, 50)])
def test_the_gradient_agrees_with_finite_differences(file: str, size: tuple[int, int]) -> None:
    exact = HPSv2(file, "small-hps", checkpointing=True).double()
    pixels = (0.2 + 0.6 * images(1, 3, *size).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(exact(pixels, ["a cat"]).sum(), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        ahead, back = (exact(pixels + sign * 1e-5 * direction, ["a cat"]) for sign in (1, -1))
    analytic = float((gradient * direction).sum())
    assert abs(analytic - float(ahead - back) / 2e-5) <= STOCK * abs(analytic)
    plain = HPSv2(file, "small-hps").double()
    assert torch.equal(torch.autograd.grad(plain(pixels, ["a cat"]).sum(), pixels)[0], gradient)
