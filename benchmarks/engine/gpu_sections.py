"""The sections of gpu.py. Each runs in a process of its own and records every figure as soon as it has it."""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine import gpu_presets
from benchmarks.engine.gpu_measure import GIB, Meter, Record, attempted, clock, compare, gradient_difference
from benchmarks.engine.gpu_models import Bench, Scale
from trajsurgery import leapalign

SAMPLED = 65536
"""The most elements of a tensor that are compared where a whole second gradient does not fit."""


def agreement(scale: Scale, record: Record) -> None:
    """FLUX.1-dev: all ways against the loop written by hand."""
    compare(Bench("flux_1_dev", scale), record, ("retain", "staged", "split"))


def times(scale: Scale, record: Record) -> None:
    """FLUX.1-dev: seconds and peak memory of an iteration."""
    bench = Bench("flux_1_dev", scale)

    def forward() -> Tensor:
        with torch.no_grad():
            return bench.velocity(bench.noise, 0)

    def both() -> None:
        bench.velocity(bench.noise, 0).backward(bench.cotangent(bench.noise))

    clock(bench, record, {"plain rollout": bench.plain, **bench.ways("recompute")}, 3)
    clock(bench, record, {"one forward": forward, "forward and backward": both}, 3)


def lora(scale: Scale, record: Record) -> None:
    """FLUX.1-dev with adapters of rank 32 in float32 beside bfloat16 weights: an iteration and an optimiser step."""
    from peft import LoraConfig

    bench = Bench("flux_1_dev", scale)
    bench.module.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    bench.module.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=targets))
    for parameter in bench.trained:
        parameter.data = parameter.data.float()
    optimiser = torch.optim.AdamW(bench.trained, 1e-4, fused=True)
    record.add("trained", sum(p.numel() for p in bench.trained))

    def step(run: Callable[[], Any]) -> None:
        run()
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)

    runs = {name: lambda run=run: step(run) for name, run in bench.ways("recompute").items()}
    clock(bench, record, runs, 2)
    bench.staged()
    record.add("finite", all(bool(p.grad.isfinite().all()) for p in bench.trained if p.grad is not None))
    record.add("moved", float(torch.stack([p.detach().abs().max() for p in bench.trained]).max()))


def full8bit(scale: Scale, record: Record) -> None:
    """All weights of FLUX.1-dev in bfloat16 under AdamW in 8 bits with stochastic rounding: that it fits and trains."""
    from torchao.optim import AdamW8bit

    bench, meter = Bench("flux_1_dev", scale), Meter(scale)
    optimiser = AdamW8bit(bench.trained, lr=1e-5, bf16_stochastic_round=True)
    target = bench.normal(tuple(bench.noise.shape), 11).float()
    sampled = bench.trained[:: max(1, len(bench.trained) // 20)]
    before = [p.detach().flatten()[:SAMPLED].clone() for p in sampled]
    for parameter in bench.trained:
        parameter.grad = torch.zeros_like(parameter)
    last: dict[str, Any] = {}

    def cotangent(x: Tensor) -> Tensor:
        """Of the reward -mean (x_0 - target)^2, which a step is to raise."""
        last["reward"] = float(-(x.float() - target).square().mean())
        return (2 * (x.float() - target) / target.numel()).to(x.dtype)

    bench.cotangent = cotangent

    def step(run: Callable[[], Any]) -> None:
        run()
        norm = torch.nn.utils.clip_grad_norm_(bench.trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)
        last["gradient_norm"] = float(norm)

    ways = bench.ways()
    for number, way in enumerate(("staged", "staged", "staged", "split", "split"), 1):
        figures = attempted(record, f"step {number}, {way}", lambda way=way: meter.run(lambda: step(ways[way])))
        if figures is not None:
            changed = [float((p.detach().flatten()[:SAMPLED] != b).float().mean()) for p, b in zip(sampled, before)]
            moved = {"changed_share": statistics.mean(changed), "finite": math.isfinite(last["gradient_norm"])}
            record.add(f"step {number}, {way}", figures | last | moved)
    bench.clear()
    record.add("reward after", float(-(bench.plain().float() - target).square().mean()))


def compiled(scale: Scale, record: Record) -> None:
    """FLUX.1-dev with compiled blocks, without checkpointing: seconds, agreement with eager, recompilations."""
    from torch._dynamo.utils import counters

    bench, meter = Bench("flux_1_dev", scale, checkpointing=False), Meter(scale)
    for parameter in bench.trained:
        parameter.grad = torch.zeros_like(parameter)

    def sample() -> list[Tensor]:
        return [p.grad.flatten()[:SAMPLED].float() for p in bench.trained if p.grad is not None]

    def measure(kind: str) -> tuple[Tensor, list[Tensor]]:
        record.add(f"{kind}, first iteration", meter.run(bench.staged))  # with the compilation
        bench.module.zero_grad(set_to_none=False)
        x = bench.staged()
        taken = sample()
        record.add(f"{kind}, plain rollout", min((meter.run(bench.plain) for _ in range(2)), key=_seconds))
        record.add(f"{kind}, staged", min((meter.run(bench.staged) for _ in range(2)), key=_seconds))
        return x, taken

    x, reference = measure("eager")
    bench.module.compile_repeated_blocks()
    x_compiled, taken = measure("compiled")
    record.add("x0_apart", float((x_compiled.float() - x.float()).abs().max()))
    record.add("sampled gradient", gradient_difference(taken, reference))
    graphs = counters["stats"]["unique_graphs"]
    bench.staged(leapalign(bench.steps - 1, 1, 0.3))
    record.add("graphs", {"compiled": graphs, "new for other times": counters["stats"]["unique_graphs"] - graphs})


def _seconds(row: dict[str, float]) -> float:
    return row["seconds"]


def sd35(scale: Scale, record: Record) -> None:
    """SD3.5-Medium at 512 px with classifier-free guidance, both passes with gradient: agreement and seconds."""
    bench = Bench("sd3_5_medium", scale)
    compare(bench, record, ("retain", "staged", "split", "recompute"))
    measured = Record(record.path, record.section, {"agreement": dict(record.figures)}, record.began)
    clock(bench, measured, {"plain rollout": bench.plain, **bench.ways()}, 3)


def predicted(scale: Scale, record: Record) -> None:
    """What the dry run predicts for `times` and `sd35`, on the CPU: GiB above weights and gradients.

    Two GPUs in the recipe stand for weights in bfloat16: on one the dry run counts float32 masters.
    """
    from trajsurgery import LeapAlign, plan_memory
    from trajsurgery.training.presets import paper

    base = paper(LeapAlign(alpha=0.3), "unused")
    hardware = replace(base.hardware, gpus=2)
    steps, k, j = scale.steps
    for model, side, guidance in (
        ("black-forest-labs/FLUX.1-dev", 720, 3.5),
        ("stabilityai/stable-diffusion-3.5-medium", 512, 4.5),
    ):
        for memory in ("retain", "staged", "split"):
            options: Any = {"memory": memory}
            size = 64 if scale.small else side
            rollout = replace(base.rollout, steps=steps, batch=2, at_once=1, size=size, guidance=guidance, **options)
            recipe = replace(base, model=model, reward="none", rollout=rollout, hardware=hardware)

            name = f"{model.partition('/')[2]}, {memory}"

            def count(recipe: Any = recipe, name: str = name) -> None:
                passing = plan_memory(recipe, leapalign(k, j, 0.3)).passing
                calls = ("kept for the calls", "one call's backward", "second gradient")
                record.add(name, {"over_gib": sum(passing[call] for call in calls) / GIB})

            attempted(record, name, count)


def recipe(scale: Scale, record: Record) -> None:
    """The training command with LoRA of rank 32, bfloat16 weights and HPSv2.1's architecture, two images at a time."""
    from benchmarks.engine.gpu_recipe import run

    run(scale, record)


KERNELS = ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def attention(scale: Scale, record: Record) -> None:
    """Which attention kernels give finite gradients at Flux's 2537 tokens, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, spawn) for name in KERNELS}
    results = {name: pool.submit(kernel, name, scale) for name, pool in pools.items()}
    for name, result in results.items():
        attempted(record, name, lambda name=name, result=result: record.add(name, result.result(40)))
        for process in (pools[name]._processes or {}).values():
            process.kill()


def kernel(name: str, scale: Scale) -> dict[str, Any]:
    """Compare one kernel's attention and gradients with those of the plain formula in float32."""
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens, generator = 37 if scale.small else 2537, torch.Generator().manual_seed(0)
    *numbers, cotangent = (torch.randn(1, tokens, 24, 128, generator=generator).to(scale.device) for _ in range(4))
    exact = [x.clone().requires_grad_() for x in numbers]
    query, key, value = (x.transpose(1, 2) for x in exact)
    scores = query @ key.mT / math.sqrt(128)
    (scores.softmax(-1) @ value).transpose(1, 2).backward(cotangent)
    given = [x.bfloat16().requires_grad_() for x in numbers]  # in the layout that diffusers passes
    query, key, value = (x.transpose(1, 2) for x in given)
    with nullcontext() if name == "default" else sdpa_kernel(getattr(SDPBackend, name)):
        functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).backward(cotangent.bfloat16())
    return gradient_difference([x.grad for x in given], [x.grad for x in exact])


SECTIONS: dict[str, tuple[Callable[[Scale, Record], None], int]] = {
    "agreement": (agreement, 110),
    "time": (times, 120),
    "full8bit": (full8bit, 130),
    "recipe": (recipe, 110),
    "sd35": (sd35, 90),
    "lora": (lora, 80),
    "compiled": (compiled, 120),
    "attention": (attention, 60),
    "lora_80gb": (gpu_presets.lora_80gb, 140),
    "full_80gb": (gpu_presets.full_80gb, 320),
    "demo": (gpu_presets.demo, 90),
    "predicted": (predicted, 400),
}
"""Each section's work and its limit in seconds, by importance. `predicted` runs on the CPU beside all others."""
