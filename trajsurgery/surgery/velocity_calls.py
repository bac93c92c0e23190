"""The ways to make a plan's model calls.

Apart from them a plan is linear. The ways of running differ only in what replaces a model call: the call itself
(retain), a Function that runs it again in the backward pass (recompute), a Function that keeps the call's graph to
itself (split), or a leaf whose gradient the staged sweep uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.plans.nodes import Node, Noise, Velocity
from trajsurgery.surgery import autograd_functions
from trajsurgery.surgery.parameters import (
    Field,
    Fields,
    Params,
    checked_call,
    field_named,
    has_trainable_parameters,
    leaves,
    trainable_only,
)
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.validation import call_field

Memory = Literal["retain", "recompute", "split"]
IN_ROLLOUT: tuple[Memory, ...] = ("retain", "split")
"""Ways in which the plan's calls are the rollout's own, where a plan fits one pass."""

Call = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor | None, str | None], Tensor]
"""Replaces a model call: (model at one time, x [batch, *latent], recorded value if any, field's name) -> v."""


class Run(Protocol):
    """A plan's run on a whole trajectory, or that of a plan for each sample (`PerSampleExecution`)."""

    trajectory: Trajectory

    @property
    def live(self) -> set[Node]:
        """The nodes that a gradient reaches."""
        ...

    @property
    def calls(self) -> list[Velocity]:
        """The calls that a gradient reaches."""
        ...

    def finish(self, fields: Fields, call: Call) -> tuple[Tensor, ...]:
        """Return the outputs."""
        ...

    def distances(self) -> dict[int, Tensor]:
        """Return {t: [batch]}."""
        ...


def check_memory(memory: str, modules: Iterable[object] = ()) -> None:
    """Raise PlanError unless `memory` is a known way to keep activations, SamplerError if these modules rule it out."""
    if memory not in get_args(Memory):
        raise PlanError(
            f'memory={memory!r}: it is "retain", "recompute" or "split"; the staged sweep is trajsurgery.backward.'
        )
    parts = (part for module in modules if isinstance(module, nn.Module) for part in module.modules())
    if memory == "split" and any(isinstance(part, DistributedDataParallel) for part in parts):
        raise SamplerError(
            "memory='split' runs a backward pass for each call, and DistributedDataParallel averages the gradients of "
            "one: the ranks would train on different gradients. Use memory='retain', trajsurgery.backward, or "
            "fully_shard."
        )


def modules_of(fields: Fields) -> Iterable[object]:
    """Return the fields themselves, of which some may be modules."""
    return fields.values() if isinstance(fields, Mapping) else (fields,)


def retained_call(call: Callable[[Tensor], Tensor], x: Tensor, recorded: Tensor | None, name: str | None) -> Tensor:
    """Make the call itself, keeping its activations."""
    return call(x)


def cut(x: Tensor) -> Tensor:
    """Return the input of a call whose graph is to end there."""
    return x.detach().requires_grad_(x.requires_grad)


def split_call(x: Tensor, v: Tensor, start: Tensor, params: tuple[Tensor, ...] | None = None) -> Tensor:
    """Return the velocity of a call that was made on `start = cut(x)`, its graph kept apart from the plan's."""
    if _inside_torch_func() or not v.requires_grad:
        return v
    return autograd_functions.split(x, (v, start), None, None, params)


def velocity_at(
    fields: Fields,
    name: str | None,
    call: Call,
    x: Tensor,
    sigma: Tensor,
    t: int | tuple[int, ...],
    recorded: Tensor | None,
    value: Tensor | None,
    live: bool,
) -> Tensor:
    """Return the velocity at x, through `call` where a gradient reaches it.

    Args:
        sigma: 0-dim, or [batch].
        recorded: the rollout's velocity at t, if there is one: its dtype is accepted.
        value: the call's value, if the rollout recorded it.
    """
    field = field_named(fields, name)
    if not live:
        with torch.no_grad():
            return call_field(field, x, sigma, t, recorded)
    with torch.enable_grad():
        return call(lambda x: check_trains(field, call_field(field, x, sigma, t, recorded), t), x, value, name)


def run_outputs(fields: Fields, memory: Memory, execution: Run, params: Params) -> tuple[Tensor, ...]:
    """Return the outputs of a run, making the remaining calls in the way of `memory`."""
    check_memory(memory, modules_of(fields))
    if params is not None:  # once: it may be an iterator
        params = trainable_only(params, not any(isinstance(node, Noise) for node in execution.live))
    if memory == "retain" or _inside_torch_func():
        return _check_differentiable(execution.finish(fields, retained_call))
    trained = functools.cache(lambda: trained_leaves(execution, fields, params))
    if memory == "split":

        def own_graph(call: Callable[[Tensor], Tensor], x: Tensor, recorded: Tensor | None, name: str | None) -> Tensor:
            if recorded is not None:
                train = trained()[name]
                if not train and not x.requires_grad:
                    return recorded
                return autograd_functions.split(x, None, call, recorded, params, train)
            start = cut(x)
            v = call(start)
            return split_call(x, v, start, params)

        return _check_differentiable(execution.finish(fields, own_graph))
    refuse_sharded(trained())

    def recomputed(call: Callable[[Tensor], Tensor], x: Tensor, recorded: Tensor | None, name: str | None) -> Tensor:
        checked = checked_call(call, trained()[name]) if params is None else call
        return autograd_functions.recompute(checked, x, trained()[name], recorded)

    return _check_differentiable(execution.finish(fields, recomputed))


def _check_differentiable(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the outputs, or raise if one that has a gradient by the plan requires none."""
    idle = [i for i, output in enumerate(outputs) if not output.requires_grad]
    if idle and not _inside_torch_func():
        raise SamplerError(
            f"outputs {idle} of the plan carry no gradient: no parameter of the field requires a gradient, or it runs "
            "under no_grad or inference_mode. Call requires_grad_() on what is to train, and leave such blocks."
        )
    return outputs


def check_trains(field: Field, v: Tensor, t: int | tuple[int, ...]) -> Tensor:
    """Return the velocity if it carries a gradient or the field is frozen on purpose; else raise."""
    lost = torch.is_grad_enabled() and not v.requires_grad and not _inside_torch_func()
    if lost and has_trainable_parameters(field):
        raise SamplerError(
            f"the velocity at t = {t} carries no gradient, though the field has parameters that train. Either it runs "
            "under no_grad or inference_mode: leave such blocks. Or its gradient checkpointing is the reentrant one, "
            "which loses parameters where the input needs no gradient: use_reentrant=False."
        )
    return v


def trained_leaves(execution: Run, fields: Fields, params: Params) -> dict[str | None, tuple[Tensor, ...]]:
    """Return the leaves of every field that the plan calls with gradient, by the field's name; some fields may be
    frozen.

    Raises:
        SamplerError: no field has any.
    """
    calls = execution.calls
    leaves_by_field: dict[str | None, tuple[Tensor, ...]] = {}
    for name in dict.fromkeys(node.field for node in calls):
        t = next(node.t for node in calls if node.field == name and isinstance(node.t, int))
        x, sigma = execution.trajectory[t], execution.trajectory.sigma(t)
        leaves_by_field[name] = leaves(field_named(fields, name), x, sigma, params, required=False)
    every = [leaf for part in leaves_by_field.values() for leaf in part]
    trainable_only(every, required=not any(isinstance(node, Noise) for node in execution.live))
    return leaves_by_field


def refuse_sharded(leaves_by_field: Mapping[str | None, tuple[Tensor, ...]]) -> None:
    """Raise SamplerError if recompute would drop the gradient of a leaf."""
    if any(hasattr(leaf, "device_mesh") for part in leaves_by_field.values() for leaf in part):
        raise SamplerError(
            "memory='recompute' returns parameter gradients from an autograd.Function, which sharded (DTensor) "
            "parameters silently drop. Use trajsurgery.backward(plan, trajectory, field, cotangent), the staged sweep."
        )


def _inside_torch_func() -> bool:
    """Whether a torch.func transform or forward AD is active, where a Function over captured parameters gives zeros."""
    dual = torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    return dual or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
