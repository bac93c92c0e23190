"""`plan_memory`: memory, operations and time of a recipe's iteration, counted on the real model under fake tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from trajsurgery.dry_run.fake_pipeline import PipelineSpec, find_spec
from trajsurgery.dry_run.gpu_kernels import KERNELS
from trajsurgery.dry_run.model_costs import Measurements, ModelCosts, measure_model
from trajsurgery.dry_run.weights import persistent_bytes, will_shard
from trajsurgery.plans.graph import needs_gradient, trained
from trajsurgery.plans.nodes import Velocity
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.velocity_calls import IN_ROLLOUT
from trajsurgery.training.averages import AVERAGE
from trajsurgery.training.distributed.sharding import choose
from trajsurgery.training.model.precision import kept_in
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Hardware

Kernels = Literal["cuda", "cpu"]
TEXT_WORD = 2
"""Bytes for each parameter of the text encoders (bfloat16), and for each number of an encoding."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a GPU, operations and seconds of one iteration."""

    model: str
    source: str
    """Where the configs come from."""
    published: int | None
    plan: str
    setting: dict[str, Any]
    parameters: int
    """Of the transformer."""
    trained: int
    calls: int
    """The plan's velocity calls with gradient."""
    held: dict[str, int]
    """Bytes a GPU that stay: weights, gradients, moments, averages, frozen parts, gathered blocks."""
    passing: dict[str, int]
    """Bytes a GPU that come and go: activations of the plan's calls, decode and reward, backward pass."""
    peak: int
    """Bytes a GPU: what stays, and the greater of the two moments that come and go."""
    flops: dict[str, int]
    """Operations of an iteration on all GPUs together."""
    seconds: float
    """Of an iteration, at the hardware's utilisation."""
    fits: bool
    gpus_needed: int | None
    """The fewest GPUs that hold it with as many images at once on each; None if no number does."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict (JSON)."""
        return asdict(self)


def plan_memory(
    recipe: Recipe,
    plan: Plan | None = None,
    *,
    found: PipelineSpec | None = None,
    kernels: Kernels = "cuda",
    measurements: Measurements | None = None,
) -> MemoryPlan:
    """Return what an iteration of the recipe takes on its `hardware`. No weights are read and no GPU is needed.

    The model is built at its real size under fake tensors, its calls are those of the pipeline's own loop, and what
    autograd saves is counted storage by storage.

    Args:
        plan: by default drawn by the recipe's method.
        found: configs of the model; by default those of its name or folder.
        kernels: "cuda" counts flash attention, fused RMSNorm and autocast's float32 layer norms; "cpu" flash attention
            alone.
        measurements: those of other recipes with this model and kernels, which are not made again.

    Raises:
        RecipeError: no config of the model. PlanError: the method allows no plan.
    """
    spec = found or find_spec(recipe.model)
    rollout, hardware = recipe.rollout, recipe.hardware
    plan = plan or recipe.method.draw(rollout.steps, torch.Generator().manual_seed(recipe.seed))
    share = math.ceil(rollout.batch / hardware.gpus)
    images = min(rollout.at_once or share, share)
    measurements = measurements or Measurements()
    with KERNELS[kernels]():
        sharded = will_shard(recipe, spec, measurements)
        counted = measure_model(recipe, spec, images, sharded=sharded, measurements=measurements)
    return _estimate(recipe, spec, plan.prepared(rollout.steps), images, counted, kernels, sharded)


def _transient_bytes(recipe: Recipe, counted: ModelCosts, calls: int, outputs: int) -> dict[str, int]:
    """Bytes a GPU that come and go."""
    call, way = counted.call, recipe.rollout.memory
    every = list(counted.model.transformer.parameters())
    second = sum(p.numel() * p.element_size() for p in every if p.requires_grad)
    activations = call.kept + max(0, calls - 1) * call.further if way in IN_ROLLOUT and calls else 0
    reward = counted.reward.kept if counted.reward else 0
    return {
        "kept for the calls": activations,
        "decode and reward": outputs * (counted.decode.kept + reward)
        + counted.decode.peak
        - counted.decode.kept
        + (counted.reward.peak - reward if counted.reward else 0),
        "one call's backward": call.peak - (call.kept if way in IN_ROLLOUT else 0) if calls else 0,
        "second gradient": second if way not in ("staged", "split") and calls > 1 else 0,
    }


def _peak(held: dict[str, int], passing: dict[str, int]) -> int:
    calls, decode, back, second = passing.values()
    return sum(held.values()) + max(calls + decode, calls + back + second)


def _operations(recipe: Recipe, plan: Plan, counted: ModelCosts, images: int) -> dict[str, int]:
    """Operations of an iteration, on all GPUs together."""
    rollout, call, decode = recipe.rollout, counted.call, counted.decode
    cost, plans = plan.cost(rollout.steps), rollout.plans
    after = plans > 1 or rollout.times == "per-sample"  # the calls are made once the rollout is over
    calls, extra, groups = cost.calls, cost.extra, math.ceil(rollout.batch / images)
    measured, live = recipe.weights_at != "none", needs_gradient(plan.outputs)
    chained = sum(isinstance(node, Velocity) and node.x in live for node in trained(plan.outputs))
    again = {
        "retain": calls + extra * (1 + measured) if after else extra + len(cost.staged),
        "recompute": calls + extra * (1 + (after and measured)),
        "staged": calls + extra * (2 + measured),
        "split": calls + extra * measured if after else extra + len(cost.staged),
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


def _gpus_needed(recipe: Recipe, counted: ModelCosts, passing: dict[str, int]) -> int | None:
    """Return the fewest GPUs, from 1 up to one for each image; transient bytes are as counted."""
    return next(
        (
            n
            for n in range(1, max(1, recipe.rollout.batch, recipe.hardware.gpus) + 1)
            if _peak(persistent_bytes(recipe, counted, n), passing) <= recipe.hardware.memory
        ),
        None,
    )


def _estimate(
    recipe: Recipe, spec: PipelineSpec, plan: Plan, images: int, counted: ModelCosts, kernels: Kernels, sharded: bool
) -> MemoryPlan:
    hardware: Hardware = recipe.hardware
    calls = plan.cost(recipe.rollout.steps).calls
    held = persistent_bytes(recipe, counted, hardware.gpus)
    passing = _transient_bytes(recipe, counted, calls, len(plan.outputs))
    flops, peak = _operations(recipe, plan, counted, images), _peak(held, passing)
    every = list(counted.model.transformer.parameters())
    return MemoryPlan(
        model=spec.name,
        source=spec.source,
        published=spec.published,
        plan=str(plan),
        setting={
            "method": type(recipe.method).__name__,
            "steps": recipe.rollout.steps,
            "size": recipe.rollout.size,
            "frames": recipe.rollout.frames,
            "batch": recipe.rollout.batch,
            "images at once a GPU": images,
            "text tokens": spec.tokens,
            "precision": recipe.rollout.precision,
            "checkpointing": recipe.rollout.checkpointing,
            "train": recipe.train.what,
            "weights": kept_in(recipe),
            "optimiser": recipe.optimiser.name,
            "shard": choose(recipe.shard, _trained(every), hardware.gpus),
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
        gpus_needed=_gpus_needed(recipe, counted, passing),
        notes=_notes(recipe, spec, counted, sharded),
    )


def _trained(every: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in every if p.requires_grad)


def _notes(recipe: Recipe, spec: PipelineSpec, counted: ModelCosts, sharded: bool) -> tuple[str, ...]:
    """What the figures leave out, or what a run can't do yet."""
    notes = list[str]()
    if spec.text_encoders:
        size = TEXT_WORD * sum(spec.text_encoders.values()) / 2**30
        then = "stay on the device, which is not counted" if recipe.train.keep_encoders else "are let go"
        notes.append(f"before the first iteration the text encoders encode all prompts ({size:.1f} GiB); they {then}.")
    prompts = recipe.iterations * recipe.rollout.batch // recipe.rollout.per_prompt
    one = TEXT_WORD * spec.tokens * spec.text_width
    if prompts * one >= 2**30:
        place = f"lie in {recipe.prompt_folder}" if recipe.prompt_folder else "stay in the host's memory, of each rank"
        notes.append(
            f"encodings {place}, {one / 2**20:.1f} MiB a prompt: up to {prompts * one / 2**30:.0f} GiB if no prompt is "
            f"drawn twice in {recipe.iterations} iterations."
        )
    if counted.reward is None:
        notes.append(f"the reward {recipe.reward} is not counted: of rewards, hpsv2.1 is known.")
    if recipe.ema_on == "cpu":
        size = AVERAGE * _trained(list(counted.model.transformer.parameters())) / 2**30
        notes.append(f"the averages lie in the host's memory: {size:.0f} GiB.")
    if recipe.rollout.precision == "bfloat16" and kept_in(recipe) == "float32" and not sharded:
        notes.append("autocast keeps a bfloat16 copy of the weights that a call used, until its backward pass.")
    return tuple(notes)
