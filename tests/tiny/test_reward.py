"""The reward of the embedded world: correct, differentiable, frozen; invalid input is refused."""

import os

import pytest
import torch
from torch import Generator

from benchmarks.world import metrics
from trajsurgery import tiny
from trajsurgery.errors import RewardError
from trajsurgery.tiny.prompt import split_prompts

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reward() -> tiny.Reward:
    return tiny.Reward()


@pytest.fixture(scope="module")
def shown() -> tuple[torch.Tensor, list[tiny.Prompt]]:
    prompts = metrics.even_prompts("heldout", 2)
    return metrics.renders(prompts, seed=3), prompts


def test_scores_are_cosines_of_open_clip(reward, shown):
    images, prompts = shown
    scores = reward(images, prompts)
    assert scores.shape == (len(prompts),)
    with torch.no_grad():
        pictures = reward.clip.encode_image(2 * images - 1)
        texts = reward.clip.encode_text(reward.tokenizer([p.text for p in prompts]))
    assert torch.allclose(scores, torch.cosine_similarity(pictures, texts), atol=1e-5)
    assert type(reward.clip).__module__ == "open_clip.model"


def test_prompts_and_their_texts_are_the_same_in_any_order_and_batch(reward, shown):
    images, prompts = shown
    scores = reward(images, prompts)
    assert torch.allclose(reward(images.flip(0), [p.text for p in reversed(prompts)]), scores.flip(0), atol=1e-5)
    assert torch.allclose(reward(images[:1], prompts[:1]), scores[:1], atol=1e-5)


def test_scores_do_not_depend_on_earlier_calls(shown):
    """Bit for bit: a resumed run has a new reward, and must get the scores of the uninterrupted run."""
    images, prompts = shown
    whole = tiny.Reward()(images, prompts)
    for parts in ((1, 5), (7, 3), (2,)):
        reward, start = tiny.Reward(), 0
        for count in parts:
            reward.embed([prompt.text for prompt in prompts[start : start + count]])
            start += count
        assert torch.equal(reward(images, prompts), whole)


def test_gradient_agrees_with_finite_differences(shown):
    exact = tiny.Reward().double()
    images = (0.8 * shown[0][:4].double() + 0.1).requires_grad_()
    prompts = shown[1][:4]
    (gradient,) = torch.autograd.grad(exact(images, prompts).sum(), images)
    for seed in range(3):
        direction = torch.randn(images.shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, back = (exact(images + sign * 1e-5 * direction, prompts) for sign in (1, -1))
        numeric = (ahead - back) / 2e-5
        analytic = (gradient * direction).sum((1, 2, 3))
        assert torch.allclose(analytic, numeric, rtol=1e-6, atol=1e-9)
        assert analytic.abs().min() > 1e-6


def test_it_is_frozen_and_in_eval_mode(reward, shown):
    assert not reward.training
    assert not any(p.requires_grad for p in reward.parameters())
    images = shown[0].clone().requires_grad_()
    reward(images, shown[1]).sum().backward()
    assert images.grad is not None
    assert all(p.grad is None for p in reward.parameters())


def test_double_and_back_leaves_no_stale_embedding(shown):
    reward = tiny.Reward()
    before = reward(*shown)
    doubled = reward.double()(shown[0].double(), shown[1])
    assert doubled.dtype == torch.float64
    assert torch.allclose(before.double(), doubled, atol=1e-4)
    assert torch.equal(reward.float()(*shown), before)


def test_errors_name_the_input_and_the_repair(reward, shown):
    images, prompts = shown
    with pytest.raises(RewardError, match=r"\[0, 1\].*output_type='pt'"):
        reward(2 * images - 1, prompts)
    with pytest.raises(RewardError, match=r"float64.*\.double"):
        reward(images.double(), prompts)
    with pytest.raises(RewardError, match=r"3, 16, 32"):
        reward(images[:, :, :16], prompts)
    with pytest.raises(RewardError, match=r"3, 32, 32"):
        reward(images[0], prompts[:1])
    with pytest.raises(RewardError, match="12 images, prompts: 11"):
        reward(images, prompts[1:])
    with pytest.raises(RewardError, match="one string"):
        reward(images[:1], prompts[0].text)
    with pytest.raises(RewardError, match="at least one"):
        reward(images[:0], [])
    broken = images.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(RewardError, match="NaN"):
        reward(broken, prompts)


@torch.no_grad()
def test_correct_renders_beat_three_hard_negatives(reward):
    figures = metrics.against_negatives(reward, 40)
    assert figures["overall"] >= 0.85
    assert figures["render_q05"] < reward.threshold < figures["render_q80"], "a hinge at the threshold can close"


@torch.no_grad()
def test_pictures_of_nothing_score_below_the_threshold(reward):
    prompts = list(split_prompts("heldout"))
    grey = torch.full((len(prompts), 3, 32, 32), 0.5)
    noise = torch.rand(grey.shape, generator=Generator().manual_seed(0))
    assert reward(grey, prompts).max() < reward.threshold
    assert (reward(noise, prompts) < reward.threshold).float().mean() > 0.98


def test_cached_embeddings_hold_no_graph(reward, shown):
    reward(*shown)
    assert all(not e.requires_grad for e in reward._texts.values())


def test_an_unknown_scorer_is_refused(tmp_path):
    with pytest.raises(RewardError, match=r"no scorer 'scorer_d'.* It has scorer, scorer_b, scorer_c"):
        tiny.Reward("scorer_d")
    with pytest.raises(RewardError, match=r"no weights in .*--stage ship"):
        tiny.Reward(tmp_path)


def test_features_are_unit_embeddings_of_the_images(reward, shown):
    features = reward.features(shown[0])
    assert torch.allclose(features.norm(dim=-1), torch.ones(len(features)), atol=1e-5)
    assert torch.allclose((features * reward.embed([p.text for p in shown[1]])).sum(-1), reward(*shown), atol=1e-6)


def test_its_scale_is_stated(reward):
    assert reward.name
    assert "cosine" in reward.scale
    assert -1 < reward.threshold < 1
