"""Scores, weight names and shapes against the original packages, as recorded by `originals/record.py`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rewards.originals import imscore_scorers, layouts, small
from trajsurgery import RewardError
from trajsurgery.rewards import hpsv3
from trajsurgery.rewards.clip import Aesthetic, CLIPScore, PickScore
from trajsurgery.rewards.contract import Reward
from trajsurgery.rewards.hpsv2 import HPSv2
from trajsurgery.rewards.hpsv3 import QUESTION
from trajsurgery.rewards.imagereward import ImageReward
from trajsurgery.rewards.judge import Judge

RECORDED = json.loads((Path(__file__).parent / "originals" / "recorded.json").read_text())
ALIKE = 1e-4
"""The relative tolerance of scores in float32. The largest difference measured is 3e-6."""
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": small.SECTIONS}}


def small_hpsv3(folder: Path, **further: Any) -> hpsv3.HPSv3:
    file = small.hpsv3(folder, QUESTION)
    text = {**small.QWEN_TEXT, **ROPE}
    return hpsv3.HPSv3(file, folder / "qwen", small.QWEN_VISION, text, torch.float32, **further)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reward]:
    import open_clip
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("originals")
    hps = small.hpsv2(folder)
    open_clip.add_model_config(folder / "small-hps.json")
    (folder / "bert").mkdir()
    BertTokenizer(vocab={word: i for i, word in enumerate(small.WORDS)}).save_pretrained(folder / "bert")
    blip = ImageReward(small.imagereward(folder), folder / "bert", small.BLIP_VISION, small.BLIP_TEXT)
    by_name = {"hpsv2": HPSv2(str(hps), "small-hps"), "image-reward": blip, "hpsv3": small_hpsv3(folder)}
    clip = small.clip(folder)
    by_name |= {"pickscore": PickScore(clip, raw=True), "clipscore": CLIPScore(clip)}
    by_name |= {"aesthetic": Aesthetic(small.aesthetic(folder), clip)}
    for reward in by_name.values():
        reward.rounded = True
    return by_name


def image(size: str) -> torch.Tensor:
    return torch.from_numpy(small.picture(size)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size, prompt", list(zip(small.SIZES, small.PROMPTS)))
@pytest.mark.parametrize("name", ["hpsv2", "image-reward", "hpsv3"])
def test_scores_are_those_of_the_original_s_package(
    rewards: dict[str, Reward], name: str, size: str, prompt: str
) -> None:
    expected = RECORDED[name]["scores"][size]
    assert float(rewards[name](image(size), [prompt])) == pytest.approx(expected, rel=ALIKE)


def score_on_imscore_s_scale(
    rewards: dict[str, Reward], name: str, pixels: torch.Tensor, prompt: str, rounded: bool
) -> float:
    """Our score on imscore's scale (its CLIPScore is exp(logit_scale) times the cosine); pixels may leave [0, 1]."""
    reward, pick = rewards["image-reward" if name == "imagereward" else name], rewards["pickscore"]
    assert isinstance(pick, PickScore)
    reward.rounded, previous = rounded, reward.rounded
    with torch.no_grad():
        score = float(reward.score(pixels, [prompt])) * (pick.factor if name == "clipscore" else 1)
    reward.rounded = previous
    return score


@pytest.mark.parametrize("size, prompt", list(zip(small.SIZES, small.PROMPTS)))
@pytest.mark.parametrize("name", imscore_scorers.SCORERS)
def test_scores_are_those_of_imscore(rewards: dict[str, Reward], name: str, size: str, prompt: str) -> None:
    """On the pixels of the authors' PIL resize; HPSv2, whose authors resize floats, on imscore's pixels."""
    expected = RECORDED["imscore"]["scores"][name]["own pixels" if name == "hpsv2" else "PIL's pixels"][size]
    assert score_on_imscore_s_scale(rewards, name, image(size), prompt, rounded=True) == pytest.approx(
        expected, rel=ALIKE
    )


@pytest.mark.parametrize("size, prompt", list(zip(small.SIZES, small.PROMPTS)))
@pytest.mark.parametrize("name", [name for name in imscore_scorers.SCORERS if name != "hpsv2"])
def test_scores_on_imscore_s_pixels_differ_by_its_resize(
    rewards: dict[str, Reward], name: str, size: str, prompt: str
) -> None:
    """imscore resizes floats without PIL's clipping, CLIPScore's bilinearly; on its pixels ours gives its scores."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    kind = InterpolationMode.BILINEAR if name == "clipscore" else InterpolationMode.BICUBIC
    pixels = Compose([Resize(224, kind), CenterCrop(224)])(image(size))
    expected = RECORDED["imscore"]["scores"][name]["own pixels"][size]
    assert score_on_imscore_s_scale(rewards, name, pixels, prompt, rounded=False) == pytest.approx(expected, rel=ALIKE)
    assert expected != pytest.approx(RECORDED["imscore"]["scores"][name]["PIL's pixels"][size], rel=ALIKE)


def test_the_installed_imscore_gives_the_recorded_scores(tmp_path: Path) -> None:
    pytest.importorskip("imscore", reason="imscore is not installed: pip install 'trajsurgery[originals]'")
    for name, kinds in imscore_scorers.imscore(tmp_path).items():
        for kind, scores in kinds.items():
            assert scores == pytest.approx(RECORDED["imscore"]["scores"][name][kind], rel=ALIKE)


def test_hpsv3_in_a_batch_and_its_second_output(rewards: dict[str, Reward]) -> None:
    expected, reward = RECORDED["hpsv3"]["scores"], rewards["hpsv3"]
    assert isinstance(reward, hpsv3.HPSv3)
    outputs = reward.outputs(image("square").expand(2, -1, -1, -1), list(small.PROMPTS[:2]))
    assert float(outputs[0, 0]) == pytest.approx(expected["square, batch 0"], rel=ALIKE)
    assert float(outputs[1, 0]) == pytest.approx(expected["square, batch 1"], rel=ALIKE)
    assert float(outputs[0, 1]) == pytest.approx(expected["square, second output"], rel=ALIKE)


def test_hpsv3_asks_the_authors_question() -> None:
    assert hashlib.sha256(QUESTION.encode()).hexdigest() == RECORDED["hpsv3"]["scores"]["the question's sha256"]


def test_hpsv3_at_full_size_uses_every_name() -> None:
    shapes = layouts.hpsv3(hpsv3.VISION, hpsv3.TEXT, 151658)
    assert layouts.digest(shapes) == RECORDED["full sizes"]["scores"]["hpsv3"]
    with torch.device("meta"):
        state = hpsv3.rename_weights({name: torch.empty(shape) for name, shape in shapes.items()})
        vision, text, head = hpsv3.build_parts(state, {}, {})
    ours = {
        f"{prefix}.{k}": v.shape
        for prefix, part in (("visual", vision), ("text", text), ("head", head))
        for k, v in part.state_dict().items()
    }
    assert {k: v.shape for k, v in state.items()} == ours
    assert len(shapes) - len(state) == 1  # lm_head


def test_hpsv2_at_full_size_uses_every_name() -> None:
    import open_clip

    with torch.device("meta"):
        ours = {k: tuple(v.shape) for k, v in open_clip.create_model("ViT-H-14", device="meta").state_dict().items()}
    assert layouts.digest(ours) == RECORDED["full sizes"]["scores"]["hpsv2"]
    assert ours == layouts.open_clip(open_clip.get_model_config("ViT-H-14"))


def test_hpsv3_refuses_special_tokens_and_narrow_images(rewards: dict[str, Reward]) -> None:
    with pytest.raises(RewardError, match="marks of the model"):
        rewards["hpsv3"](image("square"), ["a <|Reward|> cat"])
    with pytest.raises(RewardError, match="too narrow"):
        rewards["hpsv3"](torch.rand(1, 3, 2, 900), ["a cat"])


def test_checkpointing_changes_no_bit_of_hpsv3_s_gradient(tmp_path: Path) -> None:
    pixels = image("square").requires_grad_()
    plain, checkpointed = (
        torch.autograd.grad(small_hpsv3(tmp_path, checkpointing=on)(pixels, ["a cat"]).sum(), pixels)[0]
        for on in (False, True)
    )
    assert torch.equal(plain, checkpointed)
    assert float(plain.abs().sum()) > 0


def test_hpsv3_under_autocast(tmp_path: Path) -> None:
    pixels, by_dtype = image("square").requires_grad_(), dict[Any, torch.Tensor]()
    for dtype in (None, torch.bfloat16):
        reward = small_hpsv3(tmp_path)
        reward.autocast = dtype
        scores = reward(pixels, ["a cat"])
        (gradient,) = torch.autograd.grad(scores.sum(), pixels)
        by_dtype[dtype] = scores.detach()
    assert not torch.equal(by_dtype[None], by_dtype[torch.bfloat16])
    assert float((by_dtype[None] - by_dtype[torch.bfloat16]).abs()) < 0.1 * float(by_dtype[None].abs())
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


def test_a_judge_scores_but_can_t_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge.__new__(Judge)
    torch.nn.Module.__init__(judge)
    judge.answer = __import__("re").compile(r"Final Score:\s*(-?\d+(?:\.\d+)?)")
    monkeypatch.setattr(judge, "said", lambda image, prompt: f"Well.\nFinal Score: {3 + float(image.mean()):.1f}")
    images = torch.full((2, 3, 4, 4), 0.5)
    assert judge(images, ["a", "b"]).tolist() == pytest.approx([3.5, 3.5])
    with pytest.raises(RewardError, match="no gradient: it can't be trained on"):
        judge(images.requires_grad_(), ["a", "b"])
    with pytest.raises(RewardError, match=r"answered without a score.*lovely"):
        judge.number("a lovely picture")


def test_published_checksums_are_verified(tmp_path: Path) -> None:
    from trajsurgery.rewards.clip import Aesthetic

    (tmp_path / "sac+logos+ava1-l14-linearMSE.pth").write_bytes(b"cut off")
    with pytest.raises(RewardError, match=r"linearMSE.pth is not .*sha256 is [0-9a-f]{64}, expected 21dd590f"):
        Aesthetic(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")


@pytest.mark.parametrize("size", ["huge", "large"])
def test_clip_at_full_size_uses_every_name(size: str) -> None:
    """PickScore's ViT-H-14, CLIPScore's and the aesthetic head's ViT-L-14, in transformers' form."""
    from transformers import CLIPConfig, CLIPModel

    vision_width, text_width, joint, layers = (
        (1280, 1024, 1024, (32, 24)) if size == "huge" else (1024, 768, 768, (24, 12))
    )
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 4 * vision_width,
        "num_hidden_layers": layers[0],
        "patch_size": 14,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": layers[1],
        "vocab_size": 49408,
    }
    vision |= {"num_attention_heads": 16, "image_size": 224}
    text |= {"num_attention_heads": 16 if size == "huge" else 12, "max_position_embeddings": 77}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=joint))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == layouts.clip(vision, text, joint)


def test_the_aesthetic_head_at_full_size_uses_every_name() -> None:
    from trajsurgery.rewards.weight_files import linear_head

    state = {name: torch.zeros(shape) for name, shape in layouts.aesthetic().items()}
    head = linear_head("Aesthetic", state, 768)
    assert sorted(tuple(p.shape) for p in head.parameters()) == sorted(layouts.aesthetic().values())
