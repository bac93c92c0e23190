"""The recipe's trainable parameters; adapters and transformers load into a plain pipeline of diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import toy_world
from tests.builders.small_pipelines import PIPELINES
from trajsurgery import RecipeError
from trajsurgery.cli.train_command import main
from trajsurgery.training.model import lora
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Trained

TARGETS = ("to_q", "to_out.0")


def trainable_names(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", PIPELINES)
def test_adapters_load_into_a_plain_pipeline(name: str, tmp_path: Path) -> None:
    small, plain = PIPELINES[name](steps=2), PIPELINES[name](steps=2)
    before = small(output_type="latent")[0]
    lora.set_trainable(small.pipe.transformer, Trained(what="lora", rank=3, targets=TARGETS))
    assert torch.equal(small(output_type="latent")[0], before)
    assert trainable_names(small.pipe.transformer)
    assert all("lora_" in n for n in trainable_names(small.pipe.transformer))
    with torch.no_grad():
        for p in (p for p in small.pipe.transformer.parameters() if p.requires_grad):
            p.add_(0.3 * torch.randn_like(p))
    changed = small(output_type="latent")[0]
    assert not torch.allclose(changed, before, atol=1e-3)
    lora.save_trained(small.pipe, Trained(what="lora", rank=3, targets=TARGETS), tmp_path)
    plain.pipe.load_lora_weights(tmp_path)
    assert torch.equal(plain(output_type="latent")[0], changed)


@pytest.mark.parametrize("name", PIPELINES)
def test_transformers_load_into_a_plain_pipeline(name: str, tmp_path: Path) -> None:
    small, plain = PIPELINES[name](steps=2), PIPELINES[name](steps=2)
    with torch.no_grad():
        for p in small.pipe.transformer.parameters():
            p.mul_(0.9)
    lora.save_trained(small.pipe, Trained(), tmp_path)
    plain.pipe.transformer = type(small.pipe.transformer).from_pretrained(tmp_path)
    # freshly loaded weights are unaligned in memory: the last bit may differ
    torch.testing.assert_close(plain(output_type="latent")[0], small(output_type="latent")[0])


def test_a_pattern_selects_what_trains() -> None:
    module = PIPELINES["flux"]().pipe.transformer
    lora.set_trainable(module, Trained(pattern=r"single_.*attn\.to_[qkv]\."))
    assert trainable_names(module) == {
        f"single_transformer_blocks.0.attn.to_{n}.{p}" for n in "qkv" for p in ("weight", "bias")
    }
    lora.set_trainable(module, Trained())
    assert trainable_names(module) == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("wrong", [Trained(pattern="no such"), Trained(what="lora", targets=("q",))])
def test_a_pattern_or_target_without_a_match_is_refused(wrong: Trained) -> None:
    with pytest.raises(RecipeError, match=r"They are like|There are"):
        lora.set_trainable(PIPELINES["flux"]().pipe.transformer, wrong)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_is_at_least_one(rank: int) -> None:
    with pytest.raises(RecipeError, match=r"train\.rank"):
        Recipe(train=Trained(rank=rank))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("memory", ["retain", "staged", "split"])
def test_a_run_trains_only_adapters_under_autocast(memory: Any, tmp_path: Path) -> None:
    short = toy_world.recipe(tmp_path / "run", iterations=3)
    rollout = replace(short.rollout, precision="bfloat16", memory=memory)
    recipe = replace(short, rollout=rollout, train=Trained(what="lora", rank=2, targets=TARGETS, base="float32"))
    world = toy_world.world(recipe)
    frozen = {n: p.detach().clone() for n, p in world.module.named_parameters() if not p.requires_grad}
    assert main(recipe, world) is not None
    assert all(torch.equal(p, frozen[n]) for n, p in world.module.named_parameters() if n in frozen)
    assert {p.dtype for p in world.module.parameters()} == {torch.float32}
    lines = [json.loads(line) for line in (recipe.output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 for line in lines if line["kind"] == "iteration")
    plain = toy_world.pipeline()
    plain.load_lora_weights(recipe.output / "transformer")
    adapters = {n: p for n, p in plain.transformer.named_parameters() if "lora_B" in n}
    assert adapters
    assert all(p.abs().sum() > 0 for p in adapters.values())


def test_adapters_follow_from_the_seed_and_draw_nothing_from_the_global_generator() -> None:
    def drawn(global_seed: int, seed: int) -> list[torch.Tensor]:
        module = PIPELINES["flux"]().pipe.transformer
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        lora.set_trainable(module, Trained(what="lora", rank=2, targets=TARGETS), seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [p for n, p in module.named_parameters() if "lora_A" in n]

    assert all(map(torch.equal, drawn(1, 7), drawn(2, 7)))
    assert not any(map(torch.equal, drawn(1, 7), drawn(1, 8)))
