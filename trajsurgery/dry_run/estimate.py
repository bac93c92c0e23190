"""`plan_memory`: what a recipe's run takes, part by part, counted on its real model under fake tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from trajsurgery.dry_run.count import Counted, count
from trajsurgery.dry_run.fake_pipeline import Spec, spec
from trajsurgery.dry_run.kernels import KERNELS
from trajsurgery.plans.graph import needs_gradient, trained
from trajsurgery.plans.nodes import Velocity
from trajsurgery.plans.plan import Plan
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Hardware

Kernels = Literal["cuda", "cpu"]
WORD = {"float32": 4, "bfloat16": 2}
TEXT_WORD = 2
"""Bytes a parameter of the text encoders, which are loaded in bfloat16, and a number of what they make."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a GPU, operations and seconds an iteration."""

    model: str
    source: str
    """Of the configs."""
    published: int | None
    plan: str
    setting: dict[str, Any]
    parameters: int
    """Of the transformer."""
    trained: int
    calls: int
    """The plan's velocity calls with gradient."""
    held: dict[str, int]
    """Bytes a GPU that are there all the time: weights, gradients, moments, averages, frozen parts, gathered blocks."""
    passing: dict[str, int]
    """Bytes a GPU that come and go: what is kept for the plan's calls, decoder and reward, and the backward pass."""
    peak: int
    """Bytes a GPU: what is held, and the greater of its two passing moments."""
    flops: dict[str, int]
    """Operations of an iteration on all GPUs together."""
    seconds: float
    """An iteration, at the hardware's utilisation."""
    fits: bool
    gpus_needed: int | None
    """The fewest GPUs that hold it with as many images at once on each; None if no number does."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (JSON)."""
        return asdict(self)


@dataclass(frozen=True)
class _Steps:
    """A sampler of Euler steps, as `Plan.cost` asks for it."""

    steps: int

    def is_step(self, t: int) -> bool:
        """Whether the sampler went from t to t - 1 by Euler."""
        return 0 < t <= self.steps


def plan_memory(
    recipe: Recipe,
    plan: Plan | None = None,
    *,
    found: Spec | None = None,
    kernels: Kernels = "cuda",
) -> MemoryPlan:
    """What an iteration of the recipe takes on its `hardware`. No weights are read, no GPU is needed.

    The model is built at its real size under fake tensors, its calls are those of the pipeline's own loop, and what
    autograd saves is counted storage by storage. On one GPU the weights are float32 masters, cast by autocast in
    bfloat16; on several, FSDP keeps float32 shards and gathers blocks in the recipe's precision.

    Args:
        plan: drawn by the recipe's method if left out.
        found: configs of the model; else those of its name, or of its folder.
        kernels: "cuda" counts flash attention, fused RMSNorm and autocast's float32 layer norms; "cpu" flash attention
            alone.

    Raises:
        RecipeError: no config of the model. PlanError: the method allows no plan.
    """
    known = found or spec(recipe.model)
    rollout, hardware = recipe.rollout, recipe.hardware
    plan = plan or recipe.method.draw(rollout.steps, torch.Generator().manual_seed(recipe.seed))
    share = math.ceil(rollout.batch / hardware.gpus)
    images = min(rollout.at_once or share, share)
    with KERNELS[kernels]():
        counted = count(recipe, known, images, sharded=hardware.gpus > 1)
    return _estimate(recipe, known, plan.prepared(rollout.steps), images, counted, kernels)


def _held(recipe: Recipe, known: Spec, counted: Counted, gpus: int) -> dict[str, int]:
    """What is there all the time, a GPU."""
    every = list(counted.model.transformer.parameters())
    count, adapted = sum(p.numel() for p in every), _trained(every)
    buffers = sum(b.numel() * b.element_size() for b in counted.model.transformer.buffers())
    word = WORD[recipe.rollout.precision]
    found = {
        "weights": 4 * count // gpus + buffers,
        "gradients": 4 * adapted // gpus,
        "optimiser": 8 * adapted // gpus,
        "ema": 4 * adapted // gpus,
        "decoder, reward": counted.decoder_bytes + counted.reward_bytes,
    }
    if gpus > 1:  # the block in use and the next one, the gradient of one, and what belongs to no block
        share = adapted / count
        found["gathered blocks"] = int(word * (2 * counted.block + share * counted.block + counted.loose))
    return found


def _passing(recipe: Recipe, counted: Counted, calls: int, outputs: int) -> dict[str, int]:
    """What comes and goes, a GPU."""
    call, way = counted.call, recipe.rollout.memory
    every = list(counted.model.transformer.parameters())
    second = sum(p.numel() * p.element_size() for p in every if p.requires_grad)
    kept = call.kept + max(0, calls - 1) * call.further if way == "retain" and calls else 0
    reward = counted.reward.kept if counted.reward else 0
    return {
        "kept for the calls": kept,
        "decode and reward": outputs * (counted.decode.kept + reward)
        + counted.decode.peak
        - counted.decode.kept
        + (counted.reward.peak - reward if counted.reward else 0),
        "one call's backward": call.peak - (call.kept if way == "retain" else 0) if calls else 0,
        "second gradient": second if way != "staged" and calls > 1 else 0,
    }


def _peak(held: dict[str, int], passing: dict[str, int]) -> int:
    calls, decode, back, second = passing.values()
    return sum(held.values()) + max(calls + decode, calls + back + second)


def _flops(recipe: Recipe, plan: Plan, counted: Counted, images: int) -> dict[str, int]:
    """Of an iteration, all GPUs together."""
    rollout, call, decode = recipe.rollout, counted.call, counted.decode
    cost, plans = plan.cost(_Steps(rollout.steps)), rollout.plans
    after = plans > 1 or rollout.times == "per-sample"  # the calls are made once the rollout is over
    calls, extra, groups = cost.calls, cost.extra, math.ceil(rollout.batch / images)
    measured, live = recipe.weights_at != "none", needs_gradient(plan.outputs)
    chained = sum(isinstance(node, Velocity) and node.x in live for node in trained(plan.outputs))
    again = {
        "retain": calls + extra * (1 + measured) if after else extra,
        "recompute": calls + extra * (1 + (after and measured)),
        "staged": calls + extra * (2 + measured),
    }[rollout.memory]
    outputs = len(plan.outputs) if plans == 1 else 1
    reward = counted.reward
    return {
        "rollout": groups * rollout.steps * call.forward,
        "plan, forward": groups * plans * again * call.forward,
        "plan, backward": groups * plans * ((calls - chained) * call.backward + chained * call.chained),
        "decode": groups * (outputs * (decode.forward + decode.backward) + (not plan.exact) * decode.forward),
        "reward": groups
        * (outputs * (reward.forward + reward.backward) + (not plan.exact) * reward.forward if reward else 0),
    }


def _needed(recipe: Recipe, known: Spec, counted: Counted, passing: dict[str, int]) -> int | None:
    """The fewest GPUs, from 1 up to one for each image; passing bytes are those counted."""
    return next(
        (
            n
            for n in range(1, max(1, recipe.rollout.batch, recipe.hardware.gpus) + 1)
            if _peak(_held(recipe, known, counted, n), passing) <= recipe.hardware.memory
        ),
        None,
    )


def _estimate(recipe: Recipe, known: Spec, plan: Plan, images: int, counted: Counted, kernels: Kernels) -> MemoryPlan:
    hardware: Hardware = recipe.hardware
    calls = plan.cost(_Steps(recipe.rollout.steps)).calls
    held = _held(recipe, known, counted, hardware.gpus)
    passing = _passing(recipe, counted, calls, len(plan.outputs))
    flops, peak = _flops(recipe, plan, counted, images), _peak(held, passing)
    every = list(counted.model.transformer.parameters())
    return MemoryPlan(
        model=known.name,
        source=known.source,
        published=known.published,
        plan=str(plan),
        setting={
            "method": type(recipe.method).__name__,
            "steps": recipe.rollout.steps,
            "size": recipe.rollout.size,
            "frames": recipe.rollout.frames,
            "batch": recipe.rollout.batch,
            "images at once a GPU": images,
            "text tokens": known.tokens,
            "precision": recipe.rollout.precision,
            "checkpointing": recipe.rollout.checkpointing,
            "train": recipe.train.what,
            "memory": recipe.rollout.memory,
            "kernels": kernels,
            "gpus": hardware.gpus,
            "memory bytes": hardware.memory,
            "flops": hardware.flops,
            "utilisation": hardware.utilisation,
        },
        parameters=counted.model.count("transformer") - (_trained(every) if recipe.train.what == "lora" else 0),
        trained=_trained(every),
        calls=calls,
        held=held,
        passing=passing,
        peak=peak,
        flops=flops,
        seconds=sum(flops.values()) / (hardware.gpus * hardware.flops * hardware.utilisation),
        fits=peak <= hardware.memory,
        gpus_needed=_needed(recipe, known, counted, passing),
        notes=_notes(recipe, known, counted),
    )


def _trained(every: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in every if p.requires_grad)


def _notes(recipe: Recipe, known: Spec, counted: Counted) -> tuple[str, ...]:
    """What the figures leave out, or what the run can't do yet."""
    found = list[str]()
    if known.text_encoders:
        size = TEXT_WORD * sum(known.text_encoders.values()) / 2**30
        then = "stay on the device, which is not counted" if recipe.train.keep_encoders else "are let go"
        found.append(f"before the first iteration the text encoders encode all prompts ({size:.1f} GiB); they {then}.")
    prompts = recipe.iterations * recipe.rollout.batch // recipe.rollout.per_prompt
    one = TEXT_WORD * known.tokens * known.text_width
    if prompts * one >= 2**30:
        found.append(
            f"encodings stay in the host's memory, {one / 2**20:.1f} MiB a prompt: up to {prompts * one / 2**30:.0f} "
            f"GiB if no prompt is drawn twice in {recipe.iterations} iterations."
        )
    if counted.reward is None:
        found.append(f"the reward {recipe.reward} is not counted: of rewards, hpsv2.1 is known.")
    if recipe.hardware.gpus > 1:
        found.append("training shards nothing yet: the figures for several GPUs are a plan, not a run of this version.")
    if recipe.hardware.gpus > 1 and recipe.rollout.memory != "staged":
        found.append("under FSDP gradients come through the staged sweep alone: --rollout.memory staged.")
    if recipe.rollout.precision == "bfloat16" and recipe.hardware.gpus == 1:
        found.append("autocast keeps a bfloat16 copy of the weights that a call used, until its backward pass.")
    return tuple(found)
