"""Changes of a recipe that take less memory, from the one that costs least to the one that costs most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from trajsurgery.dry_run.fake_pipeline import PipelineSpec
from trajsurgery.dry_run.model_costs import prepare_decoder
from trajsurgery.errors import RecipeError
from trajsurgery.training.model.precision import KEPT, kept_in
from trajsurgery.training.recipe import EMBEDDED, Recipe, flat_settings

NOT_OF_A_RUN = ("dry_run", "fit", "hardware.")
"""Fields that only the dry run reads."""


@dataclass(frozen=True)
class Saving:
    """A change of a recipe that takes less memory."""

    says: str
    """What it does and what it costs, in words."""
    apply: Callable[[Recipe], Recipe]
    """Returns a recipe with the change; the same recipe if it has it."""


def savings(recipe: Recipe, spec: PipelineSpec) -> list[Saving]:
    """Return the changes that the recipe does not have and that its model takes, the cheapest first.

    Those that cost time come before those that change pixels or rounding, then what the weights are kept in; adapters
    in place of all weights come last.
    """
    every = [*_of_the_gradient(recipe), *_of_the_decoder(recipe), *_of_the_weights(recipe)]
    new = [saving for saving in every if saving.apply(recipe) != recipe]
    return [saving for saving in new if _decodes(saving.apply(recipe), recipe, spec)]


def _of_the_gradient(recipe: Recipe) -> Iterator[Saving]:
    share = math.ceil(recipe.rollout.batch / recipe.hardware.gpus)
    images = min(recipe.rollout.at_once or share, share)
    if recipe.rollout.memory == "retain":
        yield Saving("no second gradient of the weights, at no cost", _rollout(memory="split"))
    while images > 1:
        images = max(1, images // 2)
        yield Saving(f"{images} at once, the same batch from more rollouts", _rollout(at_once=images))
    yield Saving("the decoder's activations are computed again", _decoder(checkpointing=True))
    yield Saving("the transformer's activations are computed again", _rollout(checkpointing=True))
    yield Saving("one model call's activations at a time, and each call made once more", _rollout(memory="staged"))
    if recipe.hardware.gpus > 1 and recipe.shard != "ddp":
        yield Saving("weights gathered layer by layer, in every call", lambda r: replace(r, gather="layer"))
    yield Saving("averages in the host's memory, for a copy an iteration", lambda r: replace(r, ema_on="cpu"))


def _of_the_decoder(recipe: Recipe) -> Iterator[Saving]:
    yield Saving("the decoder computes in bfloat16, with other rounding", _decoder(precision="bfloat16"))
    side = max(recipe.rollout.shape or (math.inf,))
    for tile in (512, 256):
        if tile < min(side, recipe.decoder.tiling or math.inf):
            yield Saving("decoding in tiles, whose pixels differ a little", _decoder(tiling=tile))


def _decodes(recipe: Recipe, before: Recipe, spec: PipelineSpec) -> bool:
    """Whether the model's VAE can be prepared as the recipe says; true if it decodes as before."""
    if recipe.decoder == before.decoder:
        return True
    try:
        with FakeTensorMode():
            prepare_decoder(recipe, spec)
    except RecipeError:
        return False
    return True


def _of_the_weights(recipe: Recipe) -> Iterator[Saving]:
    yield Saving("the transformer computes in bfloat16, with other rounding", _rollout(precision="bfloat16"))
    if recipe.train.what == "full":
        yield Saving("moments of 8 bits (torchao)", lambda r: _optimiser(r, "adamw8bit"))
        yield Saving(
            "trained weights in bfloat16, rounded stochastically (torchao)",
            lambda r: _optimiser(replace(r, train=replace(r.train, weights="bfloat16")), "adamw8bit"),
        )
    yield Saving("frozen weights in bfloat16", _base("bfloat16"))
    if recipe.model not in EMBEDDED:
        yield Saving("frozen weights in int8 (torchao)", _base("int8"))
        yield Saving("frozen weights in nf4 (bitsandbytes)", _base("nf4"))
    yield Saving("adapters train in place of all weights, which takes a higher rate, such as 1e-4", _adapters)


def _rollout(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, rollout=replace(recipe.rollout, **changes))


def _decoder(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, decoder=replace(recipe.decoder, **changes))


def _optimiser(recipe: Recipe, name: Any) -> Recipe:
    return replace(recipe, optimiser=replace(recipe.optimiser, name=name))


def _adapters(recipe: Recipe) -> Recipe:
    train = recipe.train
    return recipe if train.what == "lora" else replace(recipe, train=replace(train, what="lora", weights="float32"))


def _base(name: Any) -> Callable[[Recipe], Recipe]:
    def apply(recipe: Recipe) -> Recipe:
        train = replace(recipe.train, what="lora")
        if KEPT[name] >= KEPT[kept_in(replace(recipe, train=train))]:
            return recipe
        return replace(recipe, train=replace(recipe.train, base=name))

    return apply


def flags(before: Recipe, after: Recipe) -> list[str]:
    """Return the command line's flags that make one recipe of another, such as `--rollout.at-once 1`."""
    old, new = (flat_settings(asdict(recipe)) for recipe in (before, after))
    changed = [name for name in new if new[name] != old.get(name) and not name.startswith(NOT_OF_A_RUN)]
    return [_flag(name.replace("_", "-"), new[name]) for name in changed]


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        group, dot, last = name.rpartition(".")
        return f"--{name}" if value else f"--{group}{dot}no-{last}"
    return f"--{name} {value}"
