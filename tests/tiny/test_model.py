"""The shipped tiny Flux: stock diffusers classes, a one-line call, and figures that are measured again."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Generator

from benchmarks.world import metrics
from benchmarks.world.measure import WEIGHTS, size
from trajsurgery import tiny
from trajsurgery.tiny.prompt import CATEGORIES, every_prompt
from trajsurgery.tiny.rules import judge

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
EACH = 20  # pictures a category; a share near a half then has a standard error of 0.11


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads((WEIGHTS / "measured.json").read_text())


@pytest.fixture(scope="module")
def samples(pipe) -> tuple[torch.Tensor, list[tiny.Prompt]]:
    prompts = metrics.even_prompts("heldout", EACH)
    return metrics.draw(pipe, prompts, 25, seed=101), prompts


def test_one_line_draws_a_picture(pipe):
    from PIL.Image import Image

    picture = pipe("a red circle left of a blue square", generator=Generator().manual_seed(0)).images[0]
    assert isinstance(picture, Image)
    assert picture.size == (32, 32)


def test_all_parts_are_the_stock_classes(pipe):
    import diffusers
    import transformers

    assert type(pipe) is diffusers.FluxPipeline
    assert type(pipe.vae) is diffusers.AutoencoderKL
    assert type(pipe.transformer) is diffusers.FluxTransformer2DModel
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(pipe.text_encoder) is transformers.CLIPTextModel
    assert type(pipe.text_encoder_2) is transformers.T5EncoderModel
    assert pipe.scheduler.config.shift == 1.0
    assert not pipe.scheduler.config.use_dynamic_shifting
    assert {p.dtype for part in (pipe.vae, pipe.transformer, pipe.text_encoder_2) for p in part.parameters()} == {
        torch.float32
    }


def test_a_plain_from_pretrained_draws_the_same(pipe):
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    plain = FluxPipeline.from_pretrained(WEIGHTS / "pipeline", dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    text = "a red circle left of a blue square"
    ours = pipe(text, generator=Generator().manual_seed(1), **options).images
    theirs = plain(
        text, generator=Generator().manual_seed(1), height=32, width=32, max_sequence_length=12, **options
    ).images
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_defaults_survive_a_copy_and_saving(pipe, tmp_path: Path):
    import copy

    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    twin = copy.deepcopy(pipe)
    assert twin._get_t5_prompt_embeds.__self__ is twin
    assert twin("a circle", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 32, 32)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert FluxPipeline.from_pretrained(tmp_path).transformer.dtype == torch.float32


def test_every_word_is_one_token(pipe):
    for prompt in every_prompt():
        words = len(prompt.text.split())
        assert len(pipe.tokenizer(prompt.text).input_ids) == words + 2
        ids = pipe.tokenizer_2(prompt.text).input_ids
        assert len(ids) == words + 1
        assert pipe.tokenizer_2.unk_token_id not in ids


def test_the_weights_of_a_world_fit_in_twelve_megabytes():
    videos = WEIGHTS / "wan"
    assert size(WEIGHTS) - size(videos) <= 12
    files = [path for path in WEIGHTS.rglob("*") if path.is_file() and videos not in path.parents]
    assert sum(path.stat().st_size for path in files) <= 12.5e6
    assert size(videos) <= 12


def test_the_weights_have_a_record_of_their_origin(measured):
    made = json.loads((WEIGHTS / "made.json").read_text())
    assert len(made["commit"]) == 40
    assert made["command"].startswith("python -m trajsurgery.tiny.train")
    readme = (WEIGHTS / "README.md").read_text()
    assert made["commit"] in readme
    assert f"{measured['base_heldout']['overall']:.4g}" in readme


def test_reconstructions_are_judged_right(pipe):
    figures = metrics.autoencoder(pipe.vae, EACH)
    assert figures["right"] >= 0.97
    assert figures["junk"] < 0.01


def test_base_samples_are_as_good_as_measured(samples, measured):
    verdict = judge(*samples)
    shares = {category: share for category, (share, _) in verdict.table().items()}
    assert shares["single object"] >= 0.8 - 0.1
    assert shares["colours"] >= 0.8 - 0.1
    assert shares["overall"] >= 0.4
    assert verdict.junk.mean() < 0.01
    error = (0.25 / EACH) ** 0.5
    for category in CATEGORIES:
        assert abs(shares[category] - measured["base_heldout"][category]) < 3.5 * error, category


@torch.no_grad()
def test_the_reward_ranks_correct_samples_above_others(samples):
    images, prompts = samples
    verdict = judge(images, prompts)
    assert metrics.ranking(tiny.Reward()(images, prompts), verdict)["area"] >= 0.85 - 0.03


def test_area_under_the_curve_counts_ties_as_half():
    scores = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert metrics.roc_area(scores, torch.tensor([False, False, True, True])) == pytest.approx(0.875)
    assert metrics.roc_area(-scores, torch.tensor([False, False, True, True])) == pytest.approx(0.125)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_base_holds_the_targets(split, measured):
    base = measured[f"base_{split}"]
    assert base["n"] >= 2400, "400 pictures a category: a share has a standard error of 0.025"
    assert min(base["single object"], base["colours"]) >= 0.85
    assert min(base["position"], base["attribute binding"]) >= 0.15
    assert max(base["position"], base["attribute binding"]) <= 0.6
    assert 0.45 <= base["overall"] <= 0.8
    assert base["junk"] < 0.01
    assert measured[f"ranking_{split}"]["area"] >= 0.9


def test_evaluator_autoencoder_and_reward_hold_the_targets(measured):
    assert measured["evaluator"]["right_on_renders"] >= 0.99
    assert measured["evaluator"]["false_accepts"] <= 0.01
    assert measured["autoencoder"]["right"] >= 0.97
    assert min(measured["against_negatives"][category] for category in CATEGORIES) >= 0.95
