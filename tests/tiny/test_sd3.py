"""The tiny Stable Diffusion 3: a real pipeline with the tiny Flux's encoders, and guidance in one batched call."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from benchmarks.world import metrics, sd3_parts, train
from benchmarks.world.fit_flux import corpus
from benchmarks.world.fit_sd3 import encoded, sd3_stage
from benchmarks.world.stage import Budget, run
from trajsurgery import LeapAlign, tiny
from trajsurgery.cli.train_command import main
from trajsurgery.errors import RecipeError
from trajsurgery.tiny import sd3
from trajsurgery.tiny.pipe import FOLDERS, WEIGHTS
from trajsurgery.tiny.rules import judge
from trajsurgery.training import components
from trajsurgery.training.presets import sd3 as recipes

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    assembled = sd3.assemble_pipeline(WEIGHTS, tiny.pipeline().vae, sd3_parts.transformer())
    nn.init.normal_(assembled.transformer.proj_out.weight, std=0.1)
    for block in assembled.transformer.transformer_blocks:
        nn.init.normal_(block.norm1.linear.weight, std=0.1)
    return assembled


def test_its_classes_are_the_stock_ones(pipe):
    import diffusers
    import transformers

    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    assert type(pipe.transformer) is diffusers.SD3Transformer2DModel
    assert type(pipe.text_encoder) is type(pipe.text_encoder_2) is transformers.CLIPTextModelWithProjection
    assert type(pipe.text_encoder_3) is transformers.T5EncoderModel
    assert 0.9e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 1.1e6


@torch.no_grad()
def test_its_text_embeddings_are_those_of_flux(pipe):
    states, pooled = encoded(pipe, [PROMPT, ""])
    theirs, their_pooled, _ = tiny.pipeline().encode_prompt(PROMPT, None)
    assert torch.allclose(states[:1, -theirs.shape[1] :], theirs, atol=1e-5)
    assert torch.allclose(pooled[:1], torch.cat([their_pooled, their_pooled], -1), atol=1e-5)
    embeddings = pipe.encode_prompt([PROMPT], None, None)
    assert torch.allclose(embeddings[1], states[1:], atol=1e-5), "the empty prompt is what guidance leads away from"
    assert torch.allclose(embeddings[3], pooled[1:], atol=1e-5)


def test_guidance_is_a_batch_of_two_sides_and_changes_the_image(pipe):
    def draw(guidance: float) -> torch.Tensor:
        seen.clear()
        generator = Generator().manual_seed(0)
        return pipe(PROMPT, num_inference_steps=2, guidance_scale=guidance, generator=generator, output_type="pt")[0]

    seen: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    plain, sizes = draw(1.0), list(seen)
    guided = draw(3.0)
    hook.remove()
    assert sizes == [1, 1]
    assert seen == [2, 2]
    assert plain.shape == (1, 3, 32, 32)
    assert not torch.equal(plain, guided)


def test_the_output_and_the_modulation_start_at_zero():
    model = sd3_parts.transformer()
    zero = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not m.weight.any()}
    norms = {f"transformer_blocks.{i}.{n}.linear" for i in range(3) for n in ("norm1", "norm1_context")}
    assert zero == {*norms, "norm_out.linear", "proj_out"}


@pytest.fixture(scope="module")
def shipped():
    return tiny.pipeline("sd3")


def test_shipped_samples_are_as_good_as_measured(shipped):
    each = 20  # pictures a category; a share near a half then has a standard error of 0.11
    prompts = metrics.even_prompts("heldout", each)
    verdict = judge(metrics.draw(shipped, prompts, 25, seed=101, guidance_scale=sd3.GUIDANCE), prompts)
    measured = json.loads((FOLDERS["sd3"] / "measured.json").read_text())["base_heldout"]
    assert verdict.junk.mean() < 0.01
    for category, (share, _) in verdict.table().items():
        assert abs(share - measured[category]) < 3.5 * (0.25 / each) ** 0.5, category


def test_shipped_figures_hold_the_targets():
    measured = json.loads((FOLDERS["sd3"] / "measured.json").read_text())
    for split in ("train", "heldout"):
        base = measured[f"base_{split}"]
        assert min(base["single object"], base["colours"]) >= 0.85
        assert 0.15 <= base["position"] <= 0.6
        assert 0.15 <= base["attribute binding"] <= 0.6
        assert 0.45 <= round(base["overall"], 6) <= 0.8, "a share of 480, as a float32"
        assert base["junk"] < 0.01
        assert measured[f"ranking_{split}"]["area"] >= 0.9
    made = json.loads((FOLDERS["sd3"] / "made.json").read_text())
    assert len(made["commit"]) == 40
    assert made["command"].startswith("python -m trajsurgery.tiny.train --stage sd3")
    assert recipes(LeapAlign(), "x")["tiny"].rollout.guidance == sd3.GUIDANCE


def test_it_trains_saves_loads_and_the_recipe_runs_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vae = tiny.pipeline().vae
    torch.manual_seed(0)
    made = sd3.assemble_pipeline(WEIGHTS, vae, sd3_parts.transformer())
    shift = vae.config.shift_factor
    stage = replace(sd3_stage(Budget(2, 1e-2), 4, made, corpus(vae, 32, 0)), report=None)
    run(stage, tmp_path, lambda line: None)
    assert made.transformer.proj_out.weight.any()
    sd3_parts.save(made, WEIGHTS, tmp_path / "sd3")
    loaded = sd3.pipeline(tmp_path / "sd3")
    assert loaded.vae.config.shift_factor == shift, "it decodes as the shipped Flux does"
    monkeypatch.setattr("trajsurgery.tiny.pipeline", lambda name: loaded)
    chosen = recipes(LeapAlign(), "x")["tiny"]
    rollout = replace(chosen.rollout, steps=3, batch=2, guidance=2.0)
    evaluation = replace(chosen.evaluation, images=6, steps=2, batch=6)
    recipe = replace(chosen, rollout=rollout, evaluation=evaluation, iterations=2, output=tmp_path / "run")
    result = main(recipe, components.load(recipe))
    assert result is not None
    assert "rule_before" in result


def test_other_encoders_are_refused(tmp_path: Path):
    (tmp_path / "trained_on.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"other text encoders.*--stage sd3"):
        sd3.pipeline(tmp_path)


def test_a_stage_and_a_preset_of_the_paper_s_size_exist():
    assert "sd3" in train.STAGES
    large = recipes(LeapAlign(), "x")["paper"]
    assert (large.rollout.size, large.iterations, large.rollout.batch, large.rollout.guidance) == (512, 200, 64, 3.5)


def test_an_unknown_pipeline_is_refused():
    with pytest.raises(ValueError, match="flux, sd3, wan"):
        tiny.pipeline("sdxl")  # pyright: ignore[reportArgumentType]
