"""One run of a plan: computes the value of each node once, as soon as its inputs exist."""

from __future__ import annotations

import torch
from torch import Tensor

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.plans.graph import faithful, is_faithful, needs_gradient, reached
from trajsurgery.plans.nodes import Advance, Leap, Node, Velocity
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.node_values import node_value
from trajsurgery.surgery.parameters import Fields
from trajsurgery.surgery.trajectory import Generators, Trajectory
from trajsurgery.surgery.validation import check_generator
from trajsurgery.surgery.velocity_calls import Call, velocity_at


class Execution:
    """The values of a plan's nodes on a trajectory that may still grow.

    `settle` computes everything that needs no model call, and is called as the rollout proceeds; `adopt` takes over one
    of the rollout's own calls; `finish` makes the remaining calls.
    """

    def __init__(self, plan: Plan, trajectory: Trajectory, generator: Generators = None, gradient: bool = True) -> None:
        check_plan(plan)
        check_trajectory(trajectory)
        check_generator(generator)
        self.plan = bind_to_steps(plan, trajectory.steps)
        self.trajectory = trajectory
        self.generator = generator
        outputs = self.plan.outputs
        self.live: set[Node] = needs_gradient(outputs) & set(reached(outputs)) if gradient else set()
        self.tensors: dict[Node, Tensor] = {}
        self.faithful: set[Node] = set()

    @property
    def calls(self) -> list[Velocity]:
        """The calls that a gradient reaches."""
        return [node for node in self.plan.nodes if isinstance(node, Velocity) and node in self.live]

    def settle(self) -> None:
        """Compute every node that is ready without a model call."""
        for node in self.plan.nodes:
            if (
                node not in self.tensors
                and all(parent in self.tensors for parent in node.parents)
                and self._recorded(node)
            ):
                recorded = is_faithful(node, self.faithful, self.trajectory.is_step)
                if not isinstance(node, Velocity) or (recorded and node not in self.live):
                    self._compute(node, recorded)

    def wanted(self, t: int) -> Velocity | None:
        """Return the plan's call that the rollout's own call at t can serve, once x_t is recorded."""
        for node in self.plan.nodes:
            if not isinstance(node, Velocity) or node.t != t or node not in self.live or node in self.tensors:
                continue
            if node.x in self.tensors and is_faithful(node, self.faithful, self.trajectory.is_step):
                return node
        return None

    def forget(self, t: int) -> None:
        """Drop what was computed at t, because the loop changed x_t afterwards."""
        for node in [node for node in self.tensors if node.t == t]:
            del self.tensors[node]
            self.faithful.discard(node)

    def adopt(self, node: Velocity, v: Tensor) -> None:
        """Take the rollout's own call as the plan's."""
        self.tensors[node] = v
        self.faithful.add(node)

    def finish(self, fields: Fields, call: Call) -> tuple[Tensor, ...]:
        """Return the outputs, using `call` for the remaining model calls that the gradient reaches."""
        while (node := self.next_call()) is not None:
            t, recorded = time_of(node), self.trajectory.velocities.get(time_of(node))
            value = self.trajectory.velocity(t) if self.recorded(node) else None
            x, sigma, live = self.tensors[node.x], self.trajectory.sigma(t), node in self.live
            self.take(node, velocity_at(fields, node.field, call, x, sigma, t, recorded, value, live))
        return tuple(self.tensors[output] for output in self.plan.outputs)

    def next_call(self) -> Velocity | None:
        """Return the next model call to make, computing what comes before it; None if there is none."""
        for node in self.plan.nodes:
            if node in self.tensors:
                continue
            recorded = self.recorded(node)
            if isinstance(node, Velocity) and not (recorded and node not in self.live):
                return node
            self._compute(node, recorded)
        return None

    def recorded(self, node: Node) -> bool:
        """Whether the rollout recorded the node's value."""
        return is_faithful(node, self.faithful, self.trajectory.is_step)

    def take(self, node: Velocity, v: Tensor) -> None:
        """Store the velocity of a call."""
        self._keep(node, v, self.recorded(node))

    def distances(self) -> dict[int, Tensor]:
        """Return {t: [batch]}: mean |x_t - prediction| of what lands on t; see `trajsurgery.distances`."""
        distances_at: dict[int, list[Tensor]] = {}
        for node in self.plan.nodes:
            if isinstance(node, Leap | Advance):
                t = time_of(node)
                if t not in self.trajectory.latents:  # the rollout ended before
                    continue
                misses = distances_at.setdefault(t, [])
                if node not in self.faithful:
                    real = self.trajectory[t]
                    wide = torch.promote_types(real.dtype, torch.float32)
                    misses.append((real.to(wide) - self.tensors[node].detach()).abs().reshape(len(real), -1).mean(1))
        return {
            t: torch.stack(distances_at[t]).mean(0)
            if distances_at[t]
            else self.trajectory[t].new_zeros(len(self.trajectory[t]))
            for t in sorted(distances_at, reverse=True)
        }

    def _recorded(self, node: Node) -> bool:
        """Whether the trajectory already holds what the node reads from it."""
        if node.op in ("recorded", "velocity"):
            return node.t in self.trajectory.velocities
        needed = 0 if node.op in ("renoise", "recover") else node.t
        return needed in self.trajectory.latents

    def _compute(self, node: Node, faithful: bool) -> None:
        with torch.set_grad_enabled(node in self.live):
            result = node_value(node, self.tensors, self.trajectory, faithful, self.generator)
        self._keep(node, result, faithful)

    def _keep(self, node: Node, result: Tensor, faithful: bool) -> None:
        self.tensors[node] = result if node in self.live else result.detach()
        if faithful:
            self.faithful.add(node)


def bind_to_steps(plan: Plan, steps: int) -> Plan:
    """Return the plan bound to `steps` steps.

    Raises:
        PlanError: it does not fit them, or is no plan.
    """
    check_plan(plan)
    return plan.prepared(steps)


def check_plan(plan: object) -> None:
    """Raise PlanError unless this is a plan."""
    if isinstance(plan, PerSample):
        raise PlanError(
            "received PerSample where one plan is wanted: within a rollout all samples call the model at one time. "
            "Record it first, rollout(...) or operate(pipe), then apply(PerSample(...), trajectory, field)."
        )
    if not isinstance(plan, Plan):
        name = getattr(plan, "__name__", type(plan).__name__)
        raise PlanError(
            f"received {name}, which is no plan: call it with times, leapalign(18, 7), or draw one, "
            "LeapAlign().draw(steps)."
        )


def check_trajectory(trajectory: object) -> None:
    """Raise SamplerError unless this is a trajectory."""
    if not isinstance(trajectory, Trajectory):
        raise SamplerError(
            f"received a {type(trajectory).__name__} for the trajectory: the order is (plan, trajectory, field), and "
            "the trajectory is what rollout() returns, the second of what sample() returns, or surgery.trajectory."
        )


def first_call(plan: Plan, steps: int) -> Velocity | None:
    """Return the plan's call that the sampler's first call can serve, where the loop draws x_T itself.

    Its input is x_T without gradient; a call on `noise()` is made afterwards.
    """
    differentiable = needs_gradient(plan.outputs)
    live = differentiable & set(reached(plan.outputs))
    recorded = faithful(plan.outputs, lambda _: False)
    for node in plan.nodes:
        if isinstance(node, Velocity) and node.t == steps and node in live & recorded and node.x not in differentiable:
            return node
    return None


def time_of(node: Node) -> int:
    """Return the time of a bound node."""
    assert isinstance(node.t, int), f"{node!r} was not bound by Plan.prepared"
    return node.t
