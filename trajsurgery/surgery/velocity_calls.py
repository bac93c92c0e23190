"""The ways to make a plan's model calls.

Apart from them a plan is linear. The ways of running differ only in what replaces a model call: the call itself
(retain), a Function that runs it again in the backward pass (recompute), a Function that keeps the call's graph to
itself (split), or a leaf whose gradient the staged sweep uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.plans.nodes import Node, Noise
from trajsurgery.surgery import autograd_functions, parameters
from trajsurgery.surgery.parameters import Fields, Params, field_named, leaves_by_field, trainable_only
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.validation import call_field

Memory = Literal["retain", "recompute", "split"]
IN_ROLLOUT: tuple[Memory, ...] = ("retain", "split")
"""Ways in which the plan's calls are the rollout's own, where a plan fits one pass."""


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One of a plan's model calls: `call(x)` is the velocity at x [batch, *latent]."""

    fields: Fields
    name: str | None
    """The field's."""
    trajectory: Trajectory
    t: int | tuple[int, ...]
    """The call's time, or each sample's own."""
    value: Tensor | None
    """The velocity, if the rollout recorded it."""

    def __call__(self, x: Tensor) -> Tensor:
        t, sigma_of, field = self.t, self.trajectory.sigma, field_named(self.fields, self.name)
        first, sigma = (t, sigma_of(t)) if isinstance(t, int) else (t[0], self.trajectory.times(t))
        v = call_field(field, x, sigma, t, self.trajectory.velocities.get(first))
        lost = torch.is_grad_enabled() and not v.requires_grad and not _inside_torch_func()
        if lost and parameters.has_trainable_parameters(field):
            raise SamplerError(
                f"the velocity at t = {t} carries no gradient, though the field has parameters that train. Either "
                "it runs under no_grad or inference_mode: leave such blocks. Or its gradient checkpointing is the "
                "reentrant one, which loses parameters where the input needs no gradient: use_reentrant=False."
            )
        return v


Way = Callable[[ModelCall, Tensor], Tensor]
"""What replaces a model call that a gradient reaches: (call, x [batch, *latent]) -> v."""


class Run(Protocol):
    """A plan's run on a whole trajectory, or that of a plan for each sample (`PerSampleExecution`)."""

    trajectory: Trajectory
    sources: list[Node]
    """The calls that a gradient reaches, and `noise()`."""

    def finish(self, fields: Fields, way: Way) -> tuple[Tensor, ...]: ...

    def distances(self) -> dict[int, Tensor]: ...


def check_memory(memory: str, fields: object = None) -> None:
    """Raise PlanError unless `memory` is a known way to keep activations, SamplerError if a field rules it out."""
    if memory not in get_args(Memory):
        raise PlanError(
            f'memory={memory!r}: it is "retain", "recompute" or "split"; the staged sweep is trajsurgery.backward.'
        )
    modules = [*fields.values()] if isinstance(fields, Mapping) else [fields]
    parts = (part for module in modules if isinstance(module, nn.Module) for part in module.modules())
    if memory == "split" and any(isinstance(part, DistributedDataParallel) for part in parts):
        raise SamplerError(
            "memory='split' runs a backward pass for each call, and DistributedDataParallel averages the gradients of "
            "one: the ranks would train on different gradients. Use memory='retain', trajsurgery.backward, or "
            "fully_shard."
        )


def retained_call(call: ModelCall, x: Tensor) -> Tensor:
    """Make the call itself, keeping its activations."""
    return call(x)


def cut(x: Tensor) -> Tensor:
    """Return the input of a call whose graph is to end there; x itself where `split_call` leaves the graph whole."""
    return x if _inside_torch_func() else x.detach().requires_grad_(x.requires_grad)


def split_call(x: Tensor, v: Tensor, start: Tensor, params: tuple[Tensor, ...] | None = None) -> Tensor:
    """Return the velocity of a call that was made on `start = cut(x)`, its graph kept apart from the plan's."""
    if _inside_torch_func() or not v.requires_grad:
        return v
    return autograd_functions.split(x, (v, start), None, None, params)


def velocity_at(call: ModelCall, way: Way, x: Tensor, live: bool) -> Tensor:
    """Return the velocity at x, in the way of the run if a gradient reaches the call."""
    with torch.set_grad_enabled(live):
        return way(call, x) if live else call(x)


def run_outputs(fields: Fields, memory: Memory, run: Run, params: Params) -> tuple[Tensor, ...]:
    """Return the outputs of a run, making the remaining calls in the way of `memory`, or raise if one is detached."""
    check_memory(memory, fields)
    trained = None if params is None else trainable_only(params, required=Noise not in map(type, run.sources))
    way = retained_call
    if memory != "retain" and not _inside_torch_func():
        way = _split(fields, run, trained) if memory == "split" else _recompute(fields, run, trained)
    outputs = run.finish(fields, way)
    idle = [i for i, output in enumerate(outputs) if not output.requires_grad]
    if idle and not _inside_torch_func():
        raise SamplerError(
            f"outputs {idle} of the plan carry no gradient: no parameter of the field requires a gradient, or it runs "
            "under no_grad or inference_mode. Call requires_grad_() on what is to train, and leave such blocks."
        )
    return outputs


def _split(fields: Fields, run: Run, params: tuple[Tensor, ...] | None) -> Way:
    leaves_of = functools.cache(lambda: leaves_by_field(fields, run.sources, run.trajectory, params))

    def split(call: ModelCall, x: Tensor) -> Tensor:
        if call.value is None:
            start = cut(x)
            return split_call(x, call(start), start, params)
        leaves = leaves_of()[call.name]
        trains = leaves or x.requires_grad
        return autograd_functions.split(x, None, call, call.value, params, leaves) if trains else call.value

    return split


def _recompute(fields: Fields, run: Run, params: tuple[Tensor, ...] | None) -> Way:
    leaves_of = leaves_by_field(fields, run.sources, run.trajectory, params)
    if any(hasattr(leaf, "device_mesh") for leaves in leaves_of.values() for leaf in leaves):
        raise SamplerError(
            "memory='recompute' returns parameter gradients from an autograd.Function, which sharded (DTensor) "
            "parameters silently drop. Use trajsurgery.backward(plan, trajectory, field, cotangent), the staged sweep."
        )

    def recompute(call: ModelCall, x: Tensor) -> Tensor:
        leaves = leaves_of[call.name]
        checked = call if params is not None else lambda x: parameters.check_leaves(call(x), x, leaves)
        return autograd_functions.recompute(checked, x, leaves, call.value)

    return recompute


def _inside_torch_func() -> bool:
    """Whether a torch.func transform or forward AD is active, where a Function over captured parameters gives zeros."""
    dual = torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    return dual or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
