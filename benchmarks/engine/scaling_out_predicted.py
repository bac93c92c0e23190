"""What the dry run's model predicts of a run on several GPUs, for scaling_out.py: memory, compute, communication."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from trajsurgery import LeapAlign
from trajsurgery.dry_run import MemoryPlan, plan_memory
from trajsurgery.dry_run.model_costs import Measurements
from trajsurgery.dry_run.weights import UNREDUCED
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Recipe

WAYS = {"fsdp, iteration": ("fsdp", "iteration"), "fsdp, layer": ("fsdp", "layer"), "ddp": ("ddp", "iteration")}
GATHERED = 2
"""Bytes of a gathered weight: bfloat16."""


@dataclass(frozen=True)
class Network:
    """Bytes a second that each GPU receives, and sends at the same time, in a collective."""

    within: float = 300e9
    """Between the GPUs of a machine; NVLink of an H100 has 450e9 at its peak."""
    across: float = 40e9
    """Between machines, for each GPU; a 400 Gb/s adapter for each has 50e9 at its peak."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one iteration, and the bytes that a GPU receives in them."""

    gathers: int
    """Of all weights."""
    reductions: int
    """Of all gradients, within a machine."""
    gathered: float
    reduced: float
    across: float
    """Bytes from other machines."""

    def seconds(self, network: Network) -> float:
        """Return the seconds that they take alone."""
        return (self.gathered + self.reduced) / network.within + self.across / network.across


def collectives(memory: str, gather: str, steps: int, calls: int, rollouts: int) -> tuple[int, int]:
    """Return how often an iteration gathers all weights and reduces all gradients under FSDP.

    By layer each call gathers, the sampler's and those that the staged sweep repeats, and each call's backward pass
    gathers again. Each call's backward pass reduces; the calls of retain share one. Two ranks are counted in
    tests/training/test_gradient_reduction.py.

    Args:
        calls: the plan's calls with gradient.
        rollouts: of one GPU.
    """
    if gather == "iteration":
        return 1, 1
    again = calls if memory == "staged" else 0
    return rollouts * (steps + again + calls), rollouts * (1 if memory == "retain" else calls)


def traffic(recipe: Recipe, plan: MemoryPlan) -> Traffic:
    """Return an iteration's collectives on weights in bfloat16 and gradients in float32.

    Sums across machines are made in the last rollout alone.
    """
    hardware, rollout, shard = recipe.hardware, recipe.rollout, plan.setting["shard"]
    within = min(hardware.gpus, hardware.per_node)
    nodes = math.ceil(hardware.gpus / within)
    weights, gradient = GATHERED * plan.parameters, UNREDUCED * plan.trained
    rollouts = math.ceil(rollout.batch / hardware.gpus / plan.setting["images at once a GPU"])
    if shard == "fsdp":
        gathers, reductions = collectives(rollout.memory, recipe.gather, rollout.steps, plan.calls, rollouts)
    else:
        gathers, reductions = 0, int(hardware.gpus > 1)
    last = reductions if recipe.gather == "iteration" else reductions // rollouts
    part = (within - 1) / within
    return Traffic(
        gathers,
        reductions,
        gathered=gathers * weights * part,
        reduced=reductions * gradient * part * (2 if shard == "ddp" else 1),  # DDP gathers the sums
        across=last * 2 * (nodes - 1) / nodes * gradient / within,
    )


def predict(recipe: Recipe, network: Network, measurements: Measurements | None = None) -> dict[str, Any]:
    """Return figures of one arrangement as a plain dict (JSON)."""
    plan = plan_memory(recipe, measurements=measurements)
    moved = traffic(recipe, plan)
    communication = moved.seconds(network)
    return {
        "gpus": recipe.hardware.gpus,
        "shard": plan.setting["shard"],
        "gather": recipe.gather if plan.setting["shard"] == "fsdp" else None,
        "peak_bytes": plan.peak,
        "fits": plan.fits,
        "held_bytes": plan.held,
        "compute_seconds": plan.seconds,
        "gathers": moved.gathers,
        "reductions": moved.reductions,
        "received_bytes": moved.gathered + moved.reduced + moved.across,
        "communication_seconds": communication,
        "seconds": [max(plan.seconds, communication), plan.seconds + communication],
    }


def predict_all(counts: tuple[int, ...], network: Network) -> list[dict[str, Any]]:
    """Predict the paper's run on each number of GPUs in each way."""
    paper = presets(LeapAlign(alpha=0.3), "outputs/scaling_out")["paper"]
    measurements, rows = Measurements(), list[dict[str, Any]]()
    for gpus in counts:
        for shard, gather in WAYS.values() if gpus > 1 else [("auto", "iteration")]:
            recipe: Any = replace(paper, shard=shard, gather=gather, hardware=replace(paper.hardware, gpus=gpus))
            rows.append(predict(recipe, network, measurements))
    return rows
