"""Figures of a dry run: on small models against measurements, on real models against published sizes."""

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
from trajsurgery.cli.recipe_script import cli
from trajsurgery.dry_run import MemoryPlan, PipelineSpec, find_spec
from trajsurgery.dry_run.measure import PeakMemory, flop_counter
from trajsurgery.dry_run.model_costs import ModelCosts, measure_model
from trajsurgery.training.model import lora, vae_decoding
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Decoder, Hardware, Rollout, Trained

PLAN = leapalign(4, 2, 0.3)


def video() -> Small:
    """A Wan pipeline whose guidance takes two calls."""
    wan = video_builders.wan()
    for module in (wan.pipe.transformer, wan.pipe.vae):
        torch.nn.Module.to(module, torch.float32)
    arguments = {name: v.float() if isinstance(v, Tensor) else v for name, v in wan.arguments.items()}
    return Small(wan.pipe, arguments | {"num_inference_steps": 6, "guidance_scale": 3.0})


SMALL = {**PIPELINES, "wan": video}
TOKENS = {"flux": 5, "sd3": 5, "wan": 4}


@functools.cache
def small(name: str) -> PipelineSpec:
    """The configs of a small pipeline, read from the folder that it is saved in."""
    with TemporaryDirectory() as folder:
        SMALL[name]().pipe.save_pretrained(folder)
        return replace(find_spec(folder), tokens=TOKENS[name])


def recipe(name: str, **changes: Any) -> Recipe:
    arguments = SMALL[name]().arguments
    batch, frames = len(arguments["prompt_embeds"]), arguments.get("num_frames")
    rollout = Rollout(steps=6, batch=batch, size=16, frames=frames, guidance=arguments["guidance_scale"])
    trained = changes.pop("train", Trained())
    return Recipe(method=LeapAlign(), rollout=replace(rollout, **changes), train=trained)


def prepared(name: str, settings: Recipe) -> Small:
    """The real pipeline, prepared as in a run of the recipe."""
    real = SMALL[name]()
    lora.set_trainable(real.pipe.transformer, settings.train)
    if settings.rollout.checkpointing:
        real.pipe.transformer.enable_gradient_checkpointing()
    return real


COSTS: dict[str, ModelCosts] = {}


def planned(name: str, settings: Recipe) -> MemoryPlan:
    """The memory plan of a recipe. Memory modes share the measured costs, which take most of the time."""
    key = repr((name, replace(settings, rollout=replace(settings.rollout, memory="retain"))))

    def measure_once(*args: Any, **kwargs: Any) -> ModelCosts:
        if key not in COSTS:
            COSTS[key] = measure_model(*args, **kwargs)
        return COSTS[key]

    with mock.patch("trajsurgery.dry_run.memory_plan.measure_model", measure_once):
        return plan_memory(settings, PLAN, found=small(name), kernels="cpu")


class NoModuleTracker:
    """Replaces the counter's tracker of modules, which does not allow autograd.grad inside a backward pass."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self) -> None: ...


def operations() -> Any:
    """The library's counter of operations, without its tracker of modules."""
    counter: Any = flop_counter()
    counter.mod_tracker = NoModuleTracker()
    return counter


def operate_memory(memory: str) -> Any:
    """The memory mode of `operate`; staged only records the rollout, whatever the mode."""
    return "retain" if memory == "staged" else memory


def count_saved_bytes(module: torch.nn.Module, work: Any) -> tuple[int, Any]:
    """Bytes that autograd saves during the work, without the module's parameters, and the work's result."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return sum(sizes.values()), result


def measure_run(name: str, settings: Recipe) -> tuple[int, Any, int]:
    """Bytes that autograd saves in a real rollout with the plan; the outputs; the number of trained parameters."""
    real, memory = prepared(name, settings), settings.rollout.memory

    def work() -> Any:
        with operate(real.pipe, PLAN, "recompute" if memory == "staged" else memory) as surgery:
            real(output_type="latent")
        return surgery.outputs

    saved_bytes, outputs = count_saved_bytes(real.pipe.transformer, work)
    return saved_bytes, outputs, sum(p.numel() for p in real.pipe.transformer.parameters() if p.requires_grad)


ADAPTERS = Trained(what="lora", rank=3, targets=("to_q", "to_v"))
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "lora": {"train": ADAPTERS},
    "lora, checkpointing": {"train": ADAPTERS, "checkpointing": True},
}


CASES = [(name, changes) for name in SMALL for changes in CHANGES if name == "flux" or changes in ("plain", "lora")]


@pytest.mark.parametrize("name, changes", CASES)
def test_saved_bytes_are_those_of_the_run(name: str, changes: str) -> None:
    settings = recipe(name, **CHANGES[changes])
    plan = planned(name, settings)
    saved_bytes, outputs, trained = measure_run(name, settings)
    assert outputs[0].requires_grad
    assert plan.calls == 2
    assert plan.trained == trained
    assert plan.passing["kept for the calls"] == pytest.approx(saved_bytes, rel=0.05)


@pytest.mark.parametrize("name", SMALL)
def test_recompute_saves_only_latents(name: str) -> None:
    settings = recipe(name, memory="recompute")
    saved_bytes, outputs, _ = measure_run(name, settings)
    assert planned(name, settings).passing["kept for the calls"] == 0
    assert saved_bytes <= 2 * (outputs[0].nbytes + 8)  # and a sigma


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged", "split"])
@pytest.mark.parametrize("name, changes", CASES)
def test_operations_are_those_of_the_run(name: str, changes: str, memory: Any) -> None:
    """Of rollout and plan; with retain and split the plan's forward pass is the rollout's."""
    settings = recipe(name, memory=memory, **CHANGES[changes])
    flops = planned(name, settings).flops
    real = prepared(name, settings)
    with (
        operations() as forward,
        operate(real.pipe, None if memory == "staged" else PLAN, operate_memory(memory)) as surgery,
    ):
        real(output_type="latent")
    with operations() as back:
        if memory == "staged":
            backward(PLAN, surgery.trajectory, surgery.field, torch.ones_like(surgery.trajectory[0]))
        else:
            surgery.outputs[0].sum().backward()
    assert flops["rollout"] == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert flops["plan, forward"] + flops["plan, backward"] == pytest.approx(back.get_total_flops(), rel=0.02)
    assert (flops["plan, forward"] == 0) == (memory in ("retain", "split"))


DECODERS = {"plain": Decoder(), "checkpointing": Decoder(checkpointing=True), "slicing": Decoder(slicing=True)}


@pytest.mark.parametrize(
    "name, decoder", [("flux", "plain"), ("flux", "checkpointing"), ("sd3", "slicing"), ("wan", "plain")]
)
def test_figures_of_the_decoder_are_those_of_decoding(name: str, decoder: str) -> None:
    settings = replace(recipe(name), decoder=DECODERS[decoder])
    plan = planned(name, settings)
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
    assert plan.flops["decode"] == pytest.approx(flops.get_total_flops(), rel=0.02)
    assert plan.passing["decode and reward"] == pytest.approx(alive.most, rel=0.05)


def test_memory_modes_differ_as_documented() -> None:
    plans = {
        memory: plan_memory(recipe("flux", memory=memory), PLAN, found=small("flux"))
        for memory in ("retain", "recompute", "staged", "split")
    }
    call = plans["retain"].flops["rollout"] // 6
    assert plans["retain"].flops["plan, forward"] == 0
    assert plans["recompute"].flops["plan, forward"] == plans["staged"].flops["plan, forward"] == 2 * call
    assert plans["recompute"].passing["kept for the calls"] == 0
    weights = 4 * plans["retain"].parameters
    assert [plan.passing["second gradient"] for plan in plans.values()] == [weights, weights, 0, 0]
    assert plans["split"].flops == plans["retain"].flops
    retain, recompute, staged, split = (sum(plan.passing.values()) for plan in plans.values())
    assert staged < recompute < retain
    assert staged < split == retain - weights


def test_sharding_and_hardware() -> None:
    one = plan_memory(recipe("flux"), PLAN, found=small("flux"))
    hardware = Hardware(gpus=2, memory=one.peak - 1)
    two = plan_memory(replace(recipe("flux"), hardware=hardware, shard="fsdp"), PLAN, found=small("flux"))
    assert two.setting["images at once a GPU"] == 1
    assert two.held["optimiser"] == one.held["optimiser"] // 2 == 4 * one.trained
    assert two.seconds == pytest.approx(one.seconds / 2, rel=0.01)
    assert one.gpus_needed == 1
    nodes = replace(recipe("flux"), hardware=replace(hardware, gpus=4, per_node=2), shard="fsdp")
    assert plan_memory(nodes, PLAN, found=small("flux")).held == two.held
    assert two.held["unreduced gradients"] == 4 * one.trained
    by_layer = plan_memory(replace(nodes, gather="layer"), PLAN, found=small("flux"))
    assert by_layer.held["unreduced gradients"] == 0
    copies = plan_memory(replace(recipe("flux"), hardware=hardware), PLAN, found=small("flux"))
    assert copies.held == one.held
    tight = plan_memory(replace(recipe("flux"), hardware=replace(hardware, memory=1.0)), PLAN, found=small("flux"))
    assert (tight.fits, tight.gpus_needed) == (False, None)


def test_encodings_that_would_fill_the_host_s_memory_are_noted() -> None:
    spec, settings = small("flux"), recipe("flux")
    encoded_bytes = 2 * spec.tokens * spec.transformer["joint_attention_dim"] * settings.rollout.batch
    many = replace(settings, iterations=3 * 2**30 // encoded_bytes)
    (note,) = set(plan_memory(many, PLAN, found=spec).notes) - set(plan_memory(settings, PLAN, found=spec).notes)
    assert "up to 3 GiB" in note


def test_a_model_without_config_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"nobody/nothing.*FLUX\.1-dev"):
        find_spec("nobody/nothing")


def test_a_dry_run_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = PIPELINES["flux"]()
    real.pipe.save_pretrained(tmp_path / "model")
    words = f"--dry-run --model {tmp_path / 'model'} --rollout.size 16 --output {tmp_path / 'run'}"
    assert cli({"tiny": recipe("flux")}, "words", words.split()) == 0
    printed = capsys.readouterr().out
    assert "memory of one GPU" in printed
    assert "as flash attention keeps it" in printed
    assert "it fits; 1 GPU of 80 GB holds it" in printed
    assert {"MiB", "GFLOP"} <= set(printed.split()), "small figures are not printed as 0.00 GiB"
    data = json.loads((tmp_path / "run/memory.json").read_text())
    assert data["parameters"] == sum(p.numel() for p in real.pipe.transformer.parameters())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["memory.json"]
