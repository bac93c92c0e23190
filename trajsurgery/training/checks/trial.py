"""One model call forward and backward with the recipe's settings, before anything long starts.

It finds what would otherwise be found after the first evaluation: an attention kernel whose gradient is not finite, a
loop that can't be replayed, a transformer that nothing trains.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RecipeError, SurgeryError
from trajsurgery.methods.refl import refl
from trajsurgery.pipelines.operate import operate
from trajsurgery.surgery.api import backward
from trajsurgery.surgery.velocity_calls import IN_ROLLOUT
from trajsurgery.training import srpo_support
from trajsurgery.training.components import PromptCache, RunComponents, pipeline_arguments
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.faults.memory_errors import memory_of
from trajsurgery.training.model import attention
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import as_argument

STEPS = 2


def check_gradient_is_finite(recipe: Recipe, world: RunComponents, tell: Callable[[str], None]) -> None:
    """Make the trial; with --attention auto, take the first kernel whose gradient is finite.

    Args:
        tell: shows a line to the user.

    Raises:
        RecipeError: no parameter that trains gets a gradient, or one that is not finite with every kernel.
        SamplerError: the pipeline's loop can't be replayed.
    """
    try:
        with memory_of("the trial of one model call"):
            finite = gradient_is_finite(recipe, world)
        if finite:
            return
    except SurgeryError:
        raise
    except RuntimeError as error:  # after a failed kernel CUDA runs nothing more in this process
        raise RecipeError(
            f"one model call forward and backward failed: {error} If a kernel failed, attention's is the likely one: "
            "try --attention _native_flash, _native_efficient or _native_math."
        ) from error
    kernels = attention.alternatives(world.module, world.device.type) if recipe.attention == "auto" else ()
    for name in kernels:
        try:
            attention.choose(world.module, name, world.device)
            finite = gradient_is_finite(recipe, world)
        except (RecipeError, RuntimeError):  # it does not run on this card, or not in this dtype
            continue
        if finite:
            tell(f"attention: {name}, since the gradient of diffusers' default kernel is not finite here")
            return
    with _first_not_finite(world.module) as places:
        gradient_is_finite(recipe, world)
    tried = f" Nor is it with {', '.join(kernels)}." if kernels else ""
    where = f": the first that is not is {places[0]}" if places else ""
    raise RecipeError(
        f"the gradient of one model call is not finite{where}.{tried} Try --attention with another kernel, "
        "--rollout.precision float32, or other weights."
    )


def trial_call(recipe: Recipe, world: RunComponents) -> dict[str, Any]:
    """Return the arguments of a pipeline call of two steps, with as many images as a rollout of this rank has."""
    share = ranks.rows(recipe.rollout.batch)
    texts = [world.texts[0]] * min(recipe.rollout.at_once or len(share), len(share))
    arguments = {**pipeline_arguments(recipe), **PromptCache(world.pipe, texts[:1], pipeline_arguments(recipe))(texts)}
    generator = as_argument([torch.Generator().manual_seed(i) for i in share[: len(texts)]])
    return {**arguments, "num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}


def gradient_is_finite(recipe: Recipe, world: RunComponents) -> bool:
    """Whether one call at the last step of a short rollout gives every parameter a finite gradient, on all ranks."""
    call, memory = trial_call(recipe, world), recipe.rollout.memory
    try:
        if memory == "staged" or _enters_again(recipe):
            with operate(world.pipe) as surgery:
                world.pipe(**call)
            surgery.field.check_replay(1)
            backward(refl(1), surgery.trajectory, surgery.field, torch.ones_like(surgery.trajectory[0]))
        else:
            with operate(world.pipe, refl(1), memory) as surgery:
                world.pipe(**call)
            torch.autograd.backward(surgery.outputs, [torch.ones_like(output) for output in surgery.outputs])
        sharding.reduce_gradients(world.module, recipe.gather)
        sharding.release(world.module)
        gradients = [sharding.local(p.grad) for p in world.module.parameters() if p.grad is not None]
        if not gradients:
            raise RecipeError("no parameter that trains gets a gradient from a model call: see --train.")
        return not ranks.any_rank(not bool(torch.nn.utils.get_total_norm(gradients).isfinite()))
    finally:
        sharding.release(world.module)  # FSDP's gradients are the shards'
        for parameter in world.module.parameters():
            parameter.grad = None


def _enters_again(recipe: Recipe) -> bool:
    """Whether the recipe's plans make model calls after the rollout, through the pipeline's replayed loop."""
    rollout, plan = recipe.rollout, recipe.method.draw(recipe.rollout.steps, torch.Generator().manual_seed(recipe.seed))
    one_pass = rollout.memory in IN_ROLLOUT and rollout.plans == 1 and rollout.times == "shared"
    return not one_pass or bool(
        plan.cost(rollout.steps).extra or recipe.guards.anchor or srpo_support.needs_guided_field(plan)
    )


@contextmanager
def _first_not_finite(module: nn.Module) -> Generator[list[str]]:
    """Collect, in the order in which they run, the modules whose output or gradient is not finite."""
    places = list[str]()

    def look(name: str, _: nn.Module, __: Any, values: Any) -> None:
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, Tensor) and value.is_floating_point():
                note(f"the output of {name}", value)
                if value.requires_grad:
                    value.register_hook(partial(note, f"the gradient at the output of {name}"))

    def note(place: str, value: Tensor) -> None:
        if not bool(value.isfinite().all()):
            places.append(place)

    leaves = [(name, part) for name, part in module.named_modules() if name and not any(True for _ in part.children())]
    handles = [part.register_forward_hook(partial(look, name)) for name, part in leaves]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()
