"""A dry run's figures are those of the run: on small models measured, on real ones against what is published."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.builders.pipelines import video as video_builders
from tests.builders.small_pipelines import PIPELINES, Small
from trajsurgery import LeapAlign, RecipeError, backward, leapalign, operate, plan_memory
from trajsurgery.cli.train_command import cli
from trajsurgery.dry_run import MemoryPlan, PipelineSpec, find_spec
from trajsurgery.dry_run.fake_pipeline import build_model
from trajsurgery.dry_run.gpu_kernels import KERNELS
from trajsurgery.dry_run.measure import PeakMemory, flop_counter
from trajsurgery.dry_run.model_costs import ModelCosts, measure_model
from trajsurgery.training import lora, vae_decoding
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Decoder, Hardware, Rollout, Trained

PLAN = leapalign(4, 2, 0.3)


def video() -> Small:
    """A Wan whose guidance is two calls."""
    wan = video_builders.wan()
    for module in (wan.pipe.transformer, wan.pipe.vae):
        torch.nn.Module.to(module, torch.float32)
    given = {name: v.float() if isinstance(v, Tensor) else v for name, v in wan.arguments.items()}
    return Small(wan.pipe, given | {"num_inference_steps": 6, "guidance_scale": 3.0})


SMALL = {**PIPELINES, "wan": video}
TOKENS = {"flux": 5, "sd3": 5, "wan": 4}


@functools.cache
def small(name: str) -> PipelineSpec:
    """The configs of a small pipeline, read off the folder that it is saved in."""
    with TemporaryDirectory() as folder:
        SMALL[name]().pipe.save_pretrained(folder)
        return replace(find_spec(folder), tokens=TOKENS[name])


def recipe(name: str, **changes: Any) -> Recipe:
    given = SMALL[name]().arguments
    batch, frames = len(given["prompt_embeds"]), given.get("num_frames")
    rollout = Rollout(steps=6, batch=batch, size=16, frames=frames, guidance=given["guidance_scale"])
    trained = changes.pop("train", Trained())
    return Recipe(method=LeapAlign(), rollout=replace(rollout, **changes), train=trained)


def prepared(name: str, settings: Recipe) -> Small:
    """The real pipeline, as a run of the recipe has it."""
    real = SMALL[name]()
    lora.set_trainable(real.pipe.transformer, settings.train)
    if settings.rollout.checkpointing:
        real.pipe.transformer.enable_gradient_checkpointing()
    return real


COUNTED: dict[str, ModelCosts] = {}


def planned(name: str, settings: Recipe) -> MemoryPlan:
    """The plan of a recipe; what is counted for it, which takes most of the time, is shared by the ways of running."""
    alike = repr((name, replace(settings, rollout=replace(settings.rollout, memory="retain"))))

    def once(*args: Any, **kwargs: Any) -> ModelCosts:
        if alike not in COUNTED:
            COUNTED[alike] = measure_model(*args, **kwargs)
        return COUNTED[alike]

    with mock.patch("trajsurgery.dry_run.memory_plan.measure_model", once):
        return plan_memory(settings, PLAN, found=small(name), kernels="cpu")


class Unnamed:
    """Stands in for the counter's names of modules, which an autograd.grad within a backward pass does not allow."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self) -> None: ...


def operations() -> Any:
    """The library's counter."""
    found: Any = flop_counter()
    found.mod_tracker = Unnamed()
    return found


def way_of(memory: str) -> Any:
    """How `operate` runs it; the sweep follows a rollout that is recorded only."""
    return "retain" if memory == "staged" else memory


def saved(module: torch.nn.Module, work: Any) -> tuple[int, Any]:
    """Bytes that autograd holds after the work, the module's parameters left out, and what it returned."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = work()
    return sum(held.values()), found


def measured(name: str, settings: Recipe) -> tuple[int, Any, int]:
    """Bytes that autograd holds of a real rollout with the plan in it; the outputs; how many parameters train."""
    real, memory = prepared(name, settings), settings.rollout.memory

    def work() -> Any:
        with operate(real.pipe, PLAN, "recompute" if memory == "staged" else memory) as surgery:
            real(output_type="latent")
        return surgery.outputs

    kept, outputs = saved(real.pipe.transformer, work)
    return kept, outputs, sum(p.numel() for p in real.pipe.transformer.parameters() if p.requires_grad)


ADAPTERS = Trained(what="lora", rank=3, targets=("to_q", "to_v"))
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "lora": {"train": ADAPTERS},
    "lora, checkpointing": {"train": ADAPTERS, "checkpointing": True},
}


CASES = [(name, changes) for name in SMALL for changes in CHANGES if name == "flux" or changes in ("plain", "lora")]


@pytest.mark.parametrize("name, changes", CASES)
def test_kept_bytes_are_those_of_the_run(name: str, changes: str) -> None:
    settings = recipe(name, **CHANGES[changes])
    found = planned(name, settings)
    kept, outputs, trained = measured(name, settings)
    assert outputs[0].requires_grad
    assert found.calls == 2
    assert found.trained == trained
    assert found.passing["kept for the calls"] == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("name", SMALL)
def test_where_calls_are_made_again_nothing_is_kept_but_latents(name: str) -> None:
    settings = recipe(name, memory="recompute")
    kept, outputs, _ = measured(name, settings)
    assert planned(name, settings).passing["kept for the calls"] == 0
    assert kept <= 2 * (outputs[0].nbytes + 8)  # and a sigma


@pytest.mark.parametrize("way", ["retain", "recompute", "staged", "split"])
@pytest.mark.parametrize("name, changes", CASES)
def test_operations_are_those_of_the_run(name: str, changes: str, way: Any) -> None:
    """Rollout and plan; with retain and split the plan's forward is the rollout's."""
    settings = recipe(name, memory=way, **CHANGES[changes])
    found = planned(name, settings).flops
    real = prepared(name, settings)
    with operations() as forward, operate(real.pipe, None if way == "staged" else PLAN, way_of(way)) as surgery:
        real(output_type="latent")
    with operations() as back:
        if way == "staged":
            backward(PLAN, surgery.trajectory, surgery.field, torch.ones_like(surgery.trajectory[0]))
        else:
            surgery.outputs[0].sum().backward()
    assert found["rollout"] == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert found["plan, forward"] + found["plan, backward"] == pytest.approx(back.get_total_flops(), rel=0.02)
    assert (found["plan, forward"] == 0) == (way in ("retain", "split"))


DECODERS = {"plain": Decoder(), "checkpointing": Decoder(checkpointing=True), "slicing": Decoder(slicing=True)}


@pytest.mark.parametrize(
    "name, way", [("flux", "plain"), ("flux", "checkpointing"), ("sd3", "slicing"), ("wan", "plain")]
)
def test_the_decoders_figures_are_those_of_a_decode(name: str, way: str) -> None:
    settings = replace(recipe(name), decoder=DECODERS[way])
    found = planned(name, settings)
    real = SMALL[name]()
    real.pipe.vae.requires_grad_(False)
    vae_decoding.prepare_vae(real.pipe.vae, settings.decoder)
    with operate(real.pipe) as surgery:
        real(output_type="latent")
    x = surgery.trajectory[0].detach().requires_grad_()
    with PeakMemory() as alive:
        surgery.decode(x).sum().backward()
    with operations() as flops:
        surgery.decode(x).sum().backward()
    assert found.flops["decode"] == pytest.approx(flops.get_total_flops(), rel=0.02)
    assert found.passing["decode and reward"] == pytest.approx(alive.most, rel=0.05)


def test_ways_of_running_differ_as_they_should() -> None:
    ways = {
        way: plan_memory(recipe("flux", memory=way), PLAN, found=small("flux"))
        for way in ("retain", "recompute", "staged", "split")
    }
    call = ways["retain"].flops["rollout"] // 6
    assert ways["retain"].flops["plan, forward"] == 0
    assert ways["recompute"].flops["plan, forward"] == ways["staged"].flops["plan, forward"] == 2 * call
    assert ways["recompute"].passing["kept for the calls"] == 0
    weights = 4 * ways["retain"].parameters
    assert [found.passing["second gradient"] for found in ways.values()] == [weights, weights, 0, 0]
    assert ways["split"].flops == ways["retain"].flops
    retain, recompute, staged, split = (sum(found.passing.values()) for found in ways.values())
    assert staged < recompute < retain
    assert staged < split == retain - weights


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


def test_encodings_that_would_fill_the_host_are_told() -> None:
    known, settings = small("flux"), recipe("flux")
    one = 2 * known.tokens * known.transformer["joint_attention_dim"] * settings.rollout.batch
    many = replace(settings, iterations=3 * 2**30 // one)
    (note,) = set(plan_memory(many, PLAN, found=known).notes) - set(plan_memory(settings, PLAN, found=known).notes)
    assert "up to 3 GiB" in note


def test_a_model_without_config_is_told() -> None:
    with pytest.raises(RecipeError, match=r"nobody/nothing.*FLUX\.1-dev"):
        find_spec("nobody/nothing")


def test_a_dry_run_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = PIPELINES["flux"]()
    real.pipe.save_pretrained(tmp_path / "model")
    words = f"--dry-run --model {tmp_path / 'model'} --rollout.size 16 --output {tmp_path / 'run'}"
    assert cli({"tiny": recipe("flux")}, "words", words.split()) == 0
    said = capsys.readouterr().out
    assert "memory of one GPU" in said
    assert "as flash attention keeps it" in said
    assert "it fits; 1 GPU of 80 GB holds it" in said
    assert {"MiB", "GFLOP"} <= set(said.split()), "a small model is not told as 0.00 GiB"
    data = json.loads((tmp_path / "run/memory.json").read_text())
    assert data["parameters"] == sum(p.numel() for p in real.pipe.transformer.parameters())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["memory.json"]


@pytest.mark.parametrize(
    "model, parameters",
    [
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
        ("stabilityai/stable-diffusion-3.5-medium", 2_243_171_520),
        ("Qwen/Qwen-Image", 20_430_401_088),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800),
    ],
)
def test_shipped_configs_have_the_published_size(model: str, parameters: int) -> None:
    found = find_spec(model)
    with torch.device("meta"):
        transformer = build_model(found.transformer, torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == parameters == found.published


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
    rollout = Rollout(steps=25, precision="bfloat16", size=size, guidance=1.0)
    with KERNELS["cpu"]():
        found = measure_model(Recipe(rollout=rollout, model=model), find_spec(model), 1, sharded=True)
    assert found.model.count("transformer") == parameters == find_spec(model).published
    assert found.call.kept / 2**30 == pytest.approx(kept, abs=0.01)
    assert found.call.forward / 1e12 == pytest.approx(forward, abs=0.01)
    assert found.call.backward / 1e12 == pytest.approx(backward, abs=0.01)
