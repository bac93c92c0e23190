"""Training of the tiny models: killed and resumed, it ends in the same weights as uninterrupted training."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from benchmarks.world import flux_parts, stage, train
from benchmarks.world.fit_flux import corpus, flux_stage, unpack
from benchmarks.world.fit_scorer import Course, attack, fit_loss, save_scorer, scorer_stage
from benchmarks.world.fit_text import text_stage
from benchmarks.world.layout import KINDS, layouts
from benchmarks.world.scorer_variants import VARIANTS
from benchmarks.world.stage import Budget, Stage, run
from trajsurgery.tiny.prompt import split_prompts
from trajsurgery.tiny.scene import COLOURS, SHAPES
from trajsurgery.tiny.scorer import Reward, shipped

torch.set_num_threads(1)
BUDGET = Budget(steps=4, rate=1e-3, save_every=2)


def ignore_line(line: str) -> None:
    pass


def frozen_vae() -> nn.Module:
    torch.manual_seed(0)
    return flux_parts.vae().requires_grad_(False).eval()


def build_stage(name: str, folder: Path) -> Stage:
    """Build a small stage as a new process does."""
    torch.manual_seed(12345)
    if name in VARIANTS:
        return replace(scorer_stage(replace(BUDGET, seed=1), folder, frozen_vae(), VARIANTS[name]), report=None)
    encoders = train.new_encoders(folder, seed=0)
    if name == "text":
        return replace(text_stage(BUDGET, encoders), report=None)
    vae = frozen_vae()
    torch.manual_seed(1)
    return replace(flux_stage(BUDGET, 8, flux_parts.transformer(), encoders, vae, corpus(vae, 64, seed=2)), report=None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.world.fit_scorer.POOL", 64)
    monkeypatch.setattr("benchmarks.world.fit_scorer.BATCH", 8)
    monkeypatch.setattr("benchmarks.world.fit_scorer.SPOILT", 4)
    monkeypatch.setattr("benchmarks.world.layout.SCENES", 4)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["text", "flux", "scorer", "scorer_c"])
def test_a_stage_stopped_and_resumed_is_equal_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = build_stage(name, tmp_path / "whole")
    run(whole, tmp_path / "whole", ignore_line)

    saves: list[Path] = []

    def interrupting_save(state: dict, path: Path, save=stage.save_atomically) -> None:
        save(state, path)
        saves.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_atomically", interrupting_save)
        with pytest.raises(KeyboardInterrupt):
            run(build_stage(name, tmp_path / "parts"), tmp_path / "parts", ignore_line)
    assert torch.load(saves[0])["step"] == 2
    resumed = build_stage(name, tmp_path / "parts")
    torch.rand(5)  # what a process has drawn before it resumes must not matter
    lines: list[str] = []
    run(resumed, tmp_path / "parts", lines.append)
    assert f"{name}: goes on from step 2" in lines
    for key, value in whole.modules.state_dict().items():
        assert torch.equal(value, resumed.modules.state_dict()[key]), key


@pytest.mark.usefixtures("small")
def test_scorers_differ_and_each_is_loaded_as_it_was_saved(tmp_path: Path):
    images, texts = torch.rand(3, 3, 32, 32, generator=Generator().manual_seed(0)), [*map(str, split_prompts("train"))]
    by_name: dict[str, torch.Tensor] = {}
    for name in VARIANTS:
        scorer = build_stage(name, tmp_path)
        run(scorer, tmp_path, ignore_line)
        save_scorer(scorer, tmp_path)
    for name, variant in VARIANTS.items():
        reward = Reward(tmp_path / name)
        config = json.loads((tmp_path / name / f"{variant.model}.json").read_text())
        assert config["vision_cfg"].items() >= variant.tower.items()
        assert reward.name == f"tiny:{name}"
        by_name[name] = reward(images, texts[:3])
        clip = scorer_stage(BUDGET, tmp_path / "again", frozen_vae(), variant).modules["clip"]
        saved = torch.load(tmp_path / f"{name}.checkpoint.pt")
        clip.load_state_dict({k.removeprefix("clip."): v for k, v in saved["modules"].items() if k[:5] == "clip."})
        with torch.no_grad():
            for key, value in clip.named_parameters():
                value.copy_(saved["averages"][f"clip.{key}"])
        clip.eval().to(torch.bfloat16).float()
        encodings = (
            clip.encode_image(2 * images - 1, normalize=True),
            clip.encode_text(reward.tokenizer(texts[:3]), True),
        )
        assert torch.allclose(by_name[name], (encodings[0] * encodings[1]).sum(-1), atol=1e-5)
    assert len({tuple(scores.tolist()) for scores in by_name.values()}) == len(VARIANTS)
    assert [type(Reward(tmp_path / name).clip.visual).__name__ for name in VARIANTS] == [
        *["VisionTransformer"] * 2,
        "ModifiedResNet",
    ]
    assert shipped(tmp_path) == ("scorer_b", "scorer_c")
    (tmp_path / "scorer_b" / "model.safetensors").unlink()
    assert shipped(tmp_path) == ("scorer_c",)


@pytest.mark.usefixtures("small")
def test_seeds_of_scorers_change_weights_and_scenes(tmp_path: Path):
    """A variant with the reward's tower and seeds is the reward; each of its two seeds changes one thing."""
    budget, reward = replace(BUDGET, seed=3), VARIANTS["scorer"]
    courses = [
        Course(budget, tmp_path / str(i), frozen_vae(), replace(reward, **change))
        for i, change in enumerate(({}, {}, {"seed": 1}, {"data_seed": 1}))
    ]
    weights = [course.clip.visual.conv1.weight for course in courses]
    assert [torch.equal(weights[0], w) for w in weights] == [True, True, False, True]
    assert [torch.equal(courses[0].pictures, course.pictures) for course in courses] == [True, True, True, False]
    assert [course.budget.seed for course in courses] == [3, 3, 3, 4]


def train_vae_command(folder: Path) -> list[str]:
    sizes = ["--vae-steps", "10", "--vae-batch", "8", "--save-every", "2", "--output", str(folder)]
    return [sys.executable, "-m", "benchmarks.world.train", "--stage", "vae", *sizes]


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(tmp_path: Path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    straight = subprocess.Popen(train_vae_command(whole), env=environment, stdout=subprocess.DEVNULL)
    victim = subprocess.Popen(train_vae_command(killed), env=environment, stdout=subprocess.DEVNULL)
    checkpoint = killed / "vae.checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert 0 < torch.load(checkpoint)["step"] < 10
    again = subprocess.run(train_vae_command(killed), env=environment, capture_output=True, text=True, check=True)
    assert "vae: goes on from step" in again.stdout
    assert straight.wait(timeout=120) == 0
    one, other = (train.load_vae(folder).state_dict() for folder in (whole, killed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_rate_rises_then_falls_to_nearly_nothing():
    budget = Budget(steps=1000, rate=2e-3)
    rates = [budget.rate_at(step) for step in range(1000)]
    assert rates[0] < rates[15] < max(rates) <= 2e-3
    assert rates[-1] < 1e-5
    assert rates.index(max(rates)) in range(28, 32)


def test_packing_is_flux_s_and_unpacking_inverts_it():
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    latents = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(0))
    assert torch.equal(unpack(flux_parts.pack(latents)), latents)
    assert torch.equal(flux_parts.pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 8, 8))
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
    assert torch.equal(flux_parts.image_ids(), ids)


def test_layouts_are_distributions_that_obey_the_prompt():
    prompts = split_prompts("train")
    table = layouts(prompts, Generator().manual_seed(0))
    assert torch.allclose(table.sum(-1), torch.ones(len(prompts), 4), atol=1e-5)
    chosen = next(i for i, p in enumerate(prompts) if p.relation == "left of" and p.things[0].colour is not None)
    thing = prompts[chosen].things[0]
    kind = SHAPES.index(thing.shape) * len(COLOURS) + COLOURS.index(str(thing.colour))
    assert table[chosen, [1, 3], kind].sum() == 0, "it is never on the right"
    assert table[chosen, [0, 2], kind].sum() == pytest.approx(1)
    assert KINDS == 12


def test_the_output_and_the_modulation_start_at_zero():
    model = flux_parts.transformer()
    zero = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not m.weight.any()}
    assert zero == {
        *(f"transformer_blocks.{i}.{n}.linear" for i in (0, 1) for n in ("norm1", "norm1_context")),
        *(f"single_transformer_blocks.{i}.norm.linear" for i in (0, 1)),
        "norm_out.linear",
        "proj_out",
    }


def test_the_scorer_s_loss_falls_with_the_truth_and_is_finite_without_objects():
    truth = torch.tensor([[True, False, False], [False, False, False]])
    logits = torch.zeros(2, 3)
    better = logits + torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    assert fit_loss(better, truth) < fit_loss(logits, truth)
    assert fit_loss(better[1:], truth[1:]) < fit_loss(logits[1:], truth[1:])
    assert fit_loss(logits, truth).isfinite()


def test_attacks_stay_in_their_ball_and_raise_the_loss():
    torch.manual_seed(0)
    images = torch.rand(6, 3, 32, 32)
    direction = torch.randn(3, 32, 32)
    attacked = attack(images, lambda x: (x * direction).sum(), Generator().manual_seed(1))
    lengths = (attacked - images).flatten(1).norm(dim=1)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (lengths <= 2.5 + 1e-4).all()
    assert (lengths > 0.2).all()
    assert (((attacked - images) * direction).sum((1, 2, 3)) > 0).all()
