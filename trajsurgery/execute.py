"""One run of a plan: the values of its nodes, each computed once what it needs is known.

Apart from model calls a plan is linear. The ways of running differ only in what stands in the place of a model call:
the call itself (retain), a Function that runs it again in the backward pass (recompute), or a leaf whose gradient the
staged sweep collects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trajsurgery import ops
from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.graph import faithful, is_faithful, needs_gradient, reached
from trajsurgery.inputs import called, check_generator
from trajsurgery.linear import value
from trajsurgery.node import Advance, Leap, Node, Noise, Velocity
from trajsurgery.params import Field, Fields, Params, complete, leaves, named, trainable, trains
from trajsurgery.plan import Plan
from trajsurgery.trajectory import Trajectory

Memory = Literal["retain", "recompute"]

Call = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor | None, str | None], Tensor]
"""What stands for a model call: (model at one time, x [batch, *latent], recorded value if any, field's name) -> v."""


class Execution:
    """The values of a plan's nodes on a trajectory that may still grow.

    `settle` computes all that needs no model call and is called as the rollout goes on; `adopt` takes in one of the
    rollout's own calls; `finish` makes the calls that are left.
    """

    def __init__(
        self, plan: Plan, trajectory: Trajectory, generator: torch.Generator | None = None, gradient: bool = True
    ) -> None:
        planned(plan)
        rolled(trajectory)
        check_generator(generator)
        self.plan = fitting(plan, trajectory.steps)
        self.trajectory = trajectory
        self.generator = generator
        outputs = self.plan.outputs
        self.live: set[Node] = needs_gradient(outputs) & set(reached(outputs)) if gradient else set()
        self.tensors: dict[Node, Tensor] = {}
        self.faithful: set[Node] = set()

    def settle(self) -> None:
        """Computes every node that is ready without a model call."""
        for node in self.plan.nodes:
            if (
                node not in self.tensors
                and all(parent in self.tensors for parent in node.parents)
                and self._recorded(node)
            ):
                known = is_faithful(node, self.faithful, self.trajectory.is_step)
                if not isinstance(node, Velocity) or (known and node not in self.live):
                    self._compute(node, known)

    def wanted(self, t: int) -> Velocity | None:
        """The call of the plan that the rollout's own call at t can be, once x_t is recorded."""
        for node in self.plan.nodes:
            if not isinstance(node, Velocity) or node.t != t or node not in self.live or node in self.tensors:
                continue
            if node.x in self.tensors and is_faithful(node, self.faithful, self.trajectory.is_step):
                return node
        return None

    def forget(self, t: int) -> None:
        """Drops what was computed at t: the loop changed x_t afterwards."""
        for node in [node for node in self.tensors if node.t == t]:
            del self.tensors[node]
            self.faithful.discard(node)

    def adopt(self, node: Velocity, v: Tensor) -> None:
        """Takes the rollout's own call as the plan's."""
        self.tensors[node] = v
        self.faithful.add(node)

    def finish(self, fields: Fields, call: Call) -> tuple[Tensor, ...]:
        """The outputs, with `call` for the model calls that are still to be made and that the gradient reaches."""
        for node in self.plan.nodes:
            if node in self.tensors:
                continue
            known = is_faithful(node, self.faithful, self.trajectory.is_step)
            if isinstance(node, Velocity) and not (known and node not in self.live):
                self._call(node, known, fields, call)
            else:
                self._compute(node, known)
        return tuple(self.tensors[output] for output in self.plan.outputs)

    def distances(self) -> dict[int, Tensor]:
        """{t: [batch]}: mean |x_t - prediction| of the leaps and advances that land on t; see `surgery.distances`."""
        found: dict[int, list[Tensor]] = {}
        for node in self.plan.nodes:
            if isinstance(node, Leap | Advance):
                t = _time(node)
                if t not in self.trajectory.latents:  # the rollout ended before
                    continue
                misses = found.setdefault(t, [])
                if node not in self.faithful:
                    real = self.trajectory[t]
                    wide = torch.promote_types(real.dtype, torch.float32)
                    misses.append((real.to(wide) - self.tensors[node].detach()).abs().reshape(len(real), -1).mean(1))
        return {
            t: torch.stack(found[t]).mean(0) if found[t] else self.trajectory[t].new_zeros(len(self.trajectory[t]))
            for t in sorted(found, reverse=True)
        }

    def _recorded(self, node: Node) -> bool:
        """Whether what the node reads from the trajectory is there yet."""
        if node.op in ("recorded", "velocity"):
            return node.t in self.trajectory.velocities
        needed = 0 if node.op in ("renoise", "recover") else node.t
        return needed in self.trajectory.latents

    def _compute(self, node: Node, faithful: bool) -> None:
        with torch.set_grad_enabled(node in self.live):
            found = value(node, self.tensors, self.trajectory, faithful, self.generator)
        self._keep(node, found, faithful)

    def _call(self, node: Velocity, faithful: bool, fields: Fields, call: Call) -> None:
        t, x, field = _time(node), self.tensors[node.x], named(fields, node.field)
        sigma, recorded = self.trajectory.sigma(t), self.trajectory.velocities.get(t)
        if node not in self.live:
            with torch.no_grad():
                self._keep(node, called(field, x, sigma, t, recorded), faithful)
            return
        known = self.trajectory.velocity(t) if faithful else None
        with torch.enable_grad():
            found = call(lambda x: training(field, called(field, x, sigma, t, recorded), t), x, known, node.field)
        self._keep(node, found, faithful)

    def _keep(self, node: Node, found: Tensor, faithful: bool) -> None:
        self.tensors[node] = found if node in self.live else found.detach()
        if faithful:
            self.faithful.add(node)


def fitting(plan: Plan, steps: int) -> Plan:
    """The plan bound to `steps` steps.

    Raises:
        PlanError: it does not fit them, or is no plan.
    """
    planned(plan)
    return plan.prepared(steps)


def planned(plan: object) -> None:
    """Raises PlanError for what is no plan."""
    if not isinstance(plan, Plan):
        name = getattr(plan, "__name__", type(plan).__name__)
        raise PlanError(
            f"received {name}, which is no plan: call it with times, leapalign(18, 7), or draw one, "
            "LeapAlign().draw(steps)."
        )


def rolled(trajectory: object) -> None:
    """Raises SamplerError for what is no trajectory."""
    if not isinstance(trajectory, Trajectory):
        raise SamplerError(
            f"received a {type(trajectory).__name__} for the trajectory: the order is (plan, trajectory, field), and "
            "the trajectory is what rollout() returns, the second of what sample() returns, or surgery.trajectory."
        )


def known(memory: str) -> None:
    """Raises PlanError for another way to keep activations than the two there are."""
    if memory not in ("retain", "recompute"):
        raise PlanError(f'memory={memory!r}: it is "retain" or "recompute"; the staged sweep is trajsurgery.backward.')


def first_call(plan: Plan, steps: int) -> Velocity | None:
    """The call of a prepared plan that the sampler's first can be, where the loop makes x_T by itself.

    Its input is x_T without gradient; a call on `noise()` is made afterwards.
    """
    differentiable = needs_gradient(plan.outputs)
    live = differentiable & set(reached(plan.outputs))
    known = faithful(plan.outputs, lambda _: False)
    for node in plan.nodes:
        if isinstance(node, Velocity) and node.t == steps and node in live & known and node.x not in differentiable:
            return node
    return None


def retained(call: Callable[[Tensor], Tensor], x: Tensor, known: Tensor | None, name: str | None) -> Tensor:
    """The call itself: its activations are kept."""
    return call(x)


def outputs(
    plan: Plan, trajectory: Trajectory, fields: Fields, memory: Memory, execution: Execution, params: Params
) -> tuple[Tensor, ...]:
    """The outputs of a run, with the calls that are left made in the way of `memory`."""
    known(memory)
    if params is not None:  # once: it may be an iterator
        params = trainable(params, not any(isinstance(node, Noise) for node in execution.live))
    if memory == "retain" or _transforming():
        return _differentiable(execution.finish(fields, retained))
    trained = recompute_leaves(execution, fields, params)

    def recomputed(call: Callable[[Tensor], Tensor], x: Tensor, known: Tensor | None, name: str | None) -> Tensor:
        checked = complete(call, trained[name]) if params is None else call
        return ops.recompute(checked, x, trained[name], known)

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


def training(field: Field, v: Tensor, t: int) -> Tensor:
    """The velocity, if it carries a gradient or the field has no parameter that trains."""
    lost = torch.is_grad_enabled() and not v.requires_grad and not _transforming()
    if lost and trains(field):
        raise SamplerError(
            f"the velocity at t = {t} carries no gradient, though the field has parameters that train. Either it runs "
            "under no_grad or inference_mode: leave such blocks. Or its gradient checkpointing is the reentrant one, "
            "which loses parameters where the input needs no gradient: use_reentrant=False."
        )
    return v


def recompute_leaves(execution: Execution, fields: Fields, params: Params) -> dict[str | None, tuple[Tensor, ...]]:
    """The leaves of every field that the plan calls with gradient, by the field's name; some fields may be frozen.

    Raises:
        SamplerError: no field has any; they are sharded.
    """
    calls = [node for node in execution.plan.nodes if isinstance(node, Velocity) and node in execution.live]
    found: dict[str | None, tuple[Tensor, ...]] = {}
    for name in dict.fromkeys(node.field for node in calls):
        t = next(_time(node) for node in calls if node.field == name)
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


def _time(node: Node) -> int:
    assert isinstance(node.t, int), f"{node!r} was not bound by Plan.prepared"
    return node.t
