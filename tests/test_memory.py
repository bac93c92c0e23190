"""A dry run's figures are those of the run: on small models measured, on real ones against what is published."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.small_pipelines import PIPELINES
from trajsurgery import LeapAlign, RecipeError, leapalign, lora, operate, plan_memory
from trajsurgery.memory import Spec, spec
from trajsurgery.memory.count import Counted, count
from trajsurgery.memory.kernels import KERNELS
from trajsurgery.memory.measure import counter
from trajsurgery.recipe import Recipe
from trajsurgery.run import cli
from trajsurgery.settings import Hardware, Rollout, Trained

PLAN = leapalign(4, 2, 0.3)
GIB = 2**30


@functools.cache
def small(name: str) -> Spec:
    """The configs of a small pipeline, read off the folder that it is saved in."""
    with TemporaryDirectory() as folder:
        PIPELINES[name]().pipe.save_pretrained(folder)
        return replace(spec(folder), tokens=5)


def recipe(name: str, **changes: Any) -> Recipe:
    guidance = PIPELINES[name]().arguments["guidance_scale"]
    rollout = Rollout(steps=6, batch=2, size=16, guidance=guidance)
    trained = changes.pop("train", Trained())
    return Recipe(method=LeapAlign(), rollout=replace(rollout, **changes), train=trained)


def measured(name: str, settings: Recipe) -> tuple[int, Any]:
    """Bytes that autograd holds of a real rollout with the plan in it, parameters left out; and the outputs."""
    real = PIPELINES[name]()
    lora.choose(real.pipe.transformer, settings.train)
    if settings.rollout.checkpointing:
        real.pipe.transformer.enable_gradient_checkpointing()
    own = {p.untyped_storage().data_ptr() for p in real.pipe.transformer.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), operate(real.pipe, PLAN) as surgery:
        real(output_type="latent")
    return sum(saved.values()), surgery.outputs


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"checkpointing": True}, {"train": Trained(what="lora", rank=3, targets=("to_q", "to_v"))}],
    ids=["plain", "checkpointing", "lora"],
)
def test_kept_bytes_are_those_of_the_run(name: str, changes: dict[str, Any]) -> None:
    settings = recipe(name, **changes)
    found = plan_memory(settings, PLAN, found=small(name), kernels="cpu")
    kept, outputs = measured(name, settings)
    assert outputs[0].requires_grad
    assert found.calls == 2
    assert found.passing["kept for the calls"] == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("name", PIPELINES)
def test_operations_are_those_of_the_run(name: str) -> None:
    found = plan_memory(recipe(name), PLAN, found=small(name), kernels="cpu")
    real = PIPELINES[name]()
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH), operate(real.pipe, PLAN) as surgery:
        real(output_type="latent")
    assert found.flops["rollout"] == pytest.approx(forward.get_total_flops(), rel=0.02)
    with operate(real.pipe, PLAN) as surgery:
        real(output_type="latent")
    with counter() as backward:
        surgery.outputs[0].sum().backward()
    assert found.flops["plan, backward"] == pytest.approx(backward.get_total_flops(), rel=0.02)
    assert found.flops["plan, forward"] == 0


def test_ways_of_running_differ_as_they_should() -> None:
    ways = {
        way: plan_memory(recipe("flux", memory=way), PLAN, found=small("flux"))
        for way in ("retain", "recompute", "staged")
    }
    call = ways["retain"].flops["rollout"] // 6
    assert ways["retain"].flops["plan, forward"] == 0
    assert ways["recompute"].flops["plan, forward"] == ways["staged"].flops["plan, forward"] == 2 * call
    assert ways["recompute"].passing["kept for the calls"] == 0
    weights = 4 * ways["retain"].parameters
    assert [found.passing["second gradient"] for found in ways.values()] == [weights, weights, 0]
    retain, recompute, staged = (sum(found.passing.values()) for found in ways.values())
    assert staged < recompute < retain


def test_sharding_and_hardware() -> None:
    one = plan_memory(recipe("flux"), PLAN, found=small("flux"))
    hardware = Hardware(gpus=2, memory=one.peak - 1)
    two = plan_memory(replace(recipe("flux"), hardware=hardware), PLAN, found=small("flux"))
    assert two.setting["images at once a GPU"] == 1
    assert two.held["optimiser"] == one.held["optimiser"] // 2 == 4 * one.trained
    assert two.seconds == pytest.approx(one.seconds / 2, rel=0.01)
    assert one.gpus_needed == 1
    tight = plan_memory(replace(recipe("flux"), hardware=replace(hardware, memory=1.0)), PLAN, found=small("flux"))
    assert (tight.fits, tight.gpus_needed) == (False, None)


def test_a_model_without_config_is_told() -> None:
    with pytest.raises(RecipeError, match=r"nobody/nothing.*FLUX\.1-dev"):
        spec("nobody/nothing")


def test_a_dry_run_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = PIPELINES["flux"]()
    real.pipe.save_pretrained(tmp_path / "model")
    words = f"--dry-run --model {tmp_path / 'model'} --rollout.size 16 --output {tmp_path / 'run'}"
    assert cli({"tiny": recipe("flux")}, "words", words.split()) == 0
    said = capsys.readouterr().out
    assert "memory of one GPU" in said
    assert "it fits" in said
    data = json.loads((tmp_path / "run/memory.json").read_text())
    assert data["parameters"] == sum(p.numel() for p in real.pipe.transformer.parameters())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["memory.json"]


def real(model: str, **changes: Any) -> Counted:
    rollout = replace(Rollout(steps=25, precision="bfloat16"), **changes)
    with KERNELS["cpu"]():
        return count(Recipe(rollout=rollout, model=model), spec(model), 1, sharded=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, size, parameters, kept, forward, backward",
    [
        ("black-forest-labs/FLUX.1-dev", 720, 11_901_408_320, 21.60, 37.28, 76.81),
        ("stabilityai/stable-diffusion-3.5-medium", 720, 2_243_171_520, 5.78, 4.84, 10.25),
    ],
)
def test_real_models(model: str, size: int, parameters: int, kept: float, forward: float, backward: float) -> None:
    """One velocity call in bfloat16, one image, without guidance, all norms as a CPU keeps them."""
    found = real(model, size=size, guidance=1.0)
    assert found.model.count("transformer") == parameters == spec(model).published
    assert found.call.kept / GIB == pytest.approx(kept, abs=0.01)
    assert found.call.forward / 1e12 == pytest.approx(forward, abs=0.01)
    assert found.call.backward / 1e12 == pytest.approx(backward, abs=0.01)
