"""Bytes a GPU that stay during a run: weights, gradients, optimiser, averages, and what FSDP holds whole."""

from __future__ import annotations

import torch

from trajsurgery.dry_run.fake_pipeline import PipelineSpec, build_model
from trajsurgery.dry_run.model_costs import Measurements, ModelCosts
from trajsurgery.training.averages import AVERAGE
from trajsurgery.training.distributed.sharding import choose
from trajsurgery.training.model.precision import KEPT, kept_in
from trajsurgery.training.optimisers import MOMENTS
from trajsurgery.training.recipe import Recipe

UNREDUCED = 4
"""Bytes of each trained weight's whole gradient, which --gather iteration adds up in float32 until it is reduced."""


def will_shard(recipe: Recipe, spec: PipelineSpec, measurements: Measurements) -> bool:
    """Whether FSDP shards the transformer on the recipe's hardware."""
    if recipe.train.what == "lora":
        return recipe.shard == "fsdp" and recipe.hardware.gpus > 1
    trained = measurements.once("parameters", lambda: _count(spec))
    return choose(recipe.shard, trained, recipe.hardware.gpus) == "fsdp"


def _count(spec: PipelineSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(spec.transformer, torch.float32).parameters())


def persistent_bytes(recipe: Recipe, counted: ModelCosts, gpus: int) -> dict[str, int]:
    """Return bytes a GPU that stay on `gpus` of them."""
    every = list(counted.model.transformer.parameters())
    total, adapted = sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in counted.model.transformer.buffers())
    adapters, sharded = recipe.train.what == "lora", choose(recipe.shard, adapted, gpus) == "fsdp"
    shards = min(gpus, recipe.hardware.per_node) if sharded else 1  # each node holds a copy
    of_trained = 1 if adapters else shards  # adapters stay whole
    word, trained_word = KEPT[kept_in(recipe)], 4.0 if adapters else KEPT[recipe.train.weights]
    parts = {
        "weights": word * (total - adapted) / shards + trained_word * adapted / of_trained + buffers,
        "gradients": trained_word * adapted / of_trained,
        "optimiser": MOMENTS[recipe.optimiser.name] * adapted / of_trained,
        "ema": AVERAGE * adapted / of_trained if recipe.ema_on == "device" else 0,
        "decoder, reward": counted.decoder_bytes + counted.reward_bytes,
    }
    if sharded:
        parts["gathered blocks"] = _gathered(recipe, counted, total, 0 if adapters else adapted / total)
        parts["unreduced gradients"] = UNREDUCED * adapted if recipe.gather == "iteration" and not adapters else 0
    return {name: int(size) for name, size in parts.items()}


def _gathered(recipe: Recipe, counted: ModelCosts, total: int, share: float) -> float:
    """Return bytes of gathered weights, and of one block's gradient before it is reduced."""
    word = min(KEPT[kept_in(recipe)], KEPT[recipe.rollout.precision])
    gradient = share * counted.block
    if recipe.gather == "iteration":
        return word * (total + gradient)
    return word * (2 * counted.block + gradient + counted.loose)  # the block in use and the next one
