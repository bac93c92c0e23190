"""The ways to make a plan's model calls.

Apart from them a plan is linear. The ways of running differ only in what stands in the place of a model call: the call
itself (retain), a Function that runs it again in the backward pass (recompute), or a leaf whose gradient the staged
sweep collects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.plans.nodes import Node, Noise, Velocity
from trajsurgery.surgery import autograd_functions
from trajsurgery.surgery.parameters import Field, Fields, Params, complete, leaves, named, trainable, trains
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.validation import called

Memory = Literal["retain", "recompute"]

Call = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor | None, str | None], Tensor]
"""What stands for a model call: (model at one time, x [batch, *latent], recorded value if any, field's name) -> v."""


class Run(Protocol):
    """A plan's run on a whole trajectory; so is that of one plan for each sample (`lockstep.Lockstep`)."""

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
        """The outputs."""
        ...

    def distances(self) -> dict[int, Tensor]:
        """{t: [batch]}."""
        ...


def known(memory: str) -> None:
    """Raises PlanError for another way to keep activations than the two there are."""
    if memory not in ("retain", "recompute"):
        raise PlanError(f'memory={memory!r}: it is "retain" or "recompute"; the staged sweep is trajsurgery.backward.')


def retained(call: Callable[[Tensor], Tensor], x: Tensor, known: Tensor | None, name: str | None) -> Tensor:
    """The call itself: its activations are kept."""
    return call(x)


def asked(
    fields: Fields,
    name: str | None,
    call: Call,
    x: Tensor,
    sigma: Tensor,
    t: int | tuple[int, ...],
    recorded: Tensor | None,
    known: Tensor | None,
    live: bool,
) -> Tensor:
    """The velocity at x, through `call` where a gradient reaches it.

    Args:
        sigma: 0-dim, or [batch].
        recorded: the rollout's own velocity at t, if there is one: its dtype will do.
        known: the call's value, if the rollout recorded it.
    """
    field = named(fields, name)
    if not live:
        with torch.no_grad():
            return called(field, x, sigma, t, recorded)
    with torch.enable_grad():
        return call(lambda x: training(field, called(field, x, sigma, t, recorded), t), x, known, name)


def outputs(fields: Fields, memory: Memory, execution: Run, params: Params) -> tuple[Tensor, ...]:
    """The outputs of a run, with the calls that are left made in the way of `memory`."""
    known(memory)
    if params is not None:  # once: it may be an iterator
        params = trainable(params, not any(isinstance(node, Noise) for node in execution.live))
    if memory == "retain" or _transforming():
        return _differentiable(execution.finish(fields, retained))
    trained = recompute_leaves(execution, fields, params)

    def recomputed(call: Callable[[Tensor], Tensor], x: Tensor, known: Tensor | None, name: str | None) -> Tensor:
        checked = complete(call, trained[name]) if params is None else call
        return autograd_functions.recompute(checked, x, trained[name], known)

    return _differentiable(execution.finish(fields, recomputed))


def _differentiable(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs, if each requires a gradient, as the plan says it does."""
    idle = [i for i, output in enumerate(found) if not output.requires_grad]
    if idle and not _transforming():
        raise SamplerError(
            f"outputs {idle} of the plan carry no gradient: no parameter of the field requires a gradient, or it runs "
            "under no_grad or inference_mode. Call requires_grad_() on what is to train, and leave such blocks."
        )
    return found


def training(field: Field, v: Tensor, t: int | tuple[int, ...]) -> Tensor:
    """The velocity, if it carries a gradient or the field has no parameter that trains."""
    lost = torch.is_grad_enabled() and not v.requires_grad and not _transforming()
    if lost and trains(field):
        raise SamplerError(
            f"the velocity at t = {t} carries no gradient, though the field has parameters that train. Either it runs "
            "under no_grad or inference_mode: leave such blocks. Or its gradient checkpointing is the reentrant one, "
            "which loses parameters where the input needs no gradient: use_reentrant=False."
        )
    return v


def recompute_leaves(execution: Run, fields: Fields, params: Params) -> dict[str | None, tuple[Tensor, ...]]:
    """The leaves of every field that the plan calls with gradient, by the field's name; some fields may be frozen.

    Raises:
        SamplerError: no field has any; they are sharded.
    """
    calls = execution.calls
    found: dict[str | None, tuple[Tensor, ...]] = {}
    for name in dict.fromkeys(node.field for node in calls):
        t = next(node.t for node in calls if node.field == name and isinstance(node.t, int))
        x, sigma = execution.trajectory[t], execution.trajectory.sigma(t)
        found[name] = leaves(named(fields, name), x, sigma, params, required=False)
    every = [leaf for part in found.values() for leaf in part]
    trainable(every, required=not any(isinstance(node, Noise) for node in execution.live))
    if any(hasattr(leaf, "device_mesh") for leaf in every):
        raise SamplerError(
            "memory='recompute' returns parameter gradients from an autograd.Function, which sharded (DTensor) "
            "parameters silently drop. Use trajsurgery.backward(plan, trajectory, field, cotangent), the staged sweep."
        )
    return found


def _transforming() -> bool:
    """Whether a torch.func transform or forward AD is at work: a Function over captured parameters is zero there."""
    dual = torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    return dual or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
