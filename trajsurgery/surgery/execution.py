"""One run of a plan: the values of its nodes, each computed once what it needs is known."""

from __future__ import annotations

import torch
from torch import Tensor

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.plans.graph import faithful, is_faithful, needs_gradient, reached
from trajsurgery.plans.nodes import Advance, Leap, Node, Velocity
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.node_values import value
from trajsurgery.surgery.parameters import Fields
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.validation import check_generator
from trajsurgery.surgery.velocity_calls import Call, asked


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

    @property
    def calls(self) -> list[Velocity]:
        """The calls that a gradient reaches."""
        return [node for node in self.plan.nodes if isinstance(node, Velocity) and node in self.live]

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
        while (node := self.next_call()) is not None:
            t, recorded = time(node), self.trajectory.velocities.get(time(node))
            known = self.trajectory.velocity(t) if self.recorded(node) else None
            x, sigma, live = self.tensors[node.x], self.trajectory.sigma(t), node in self.live
            self.take(node, asked(fields, node.field, call, x, sigma, t, recorded, known, live))
        return tuple(self.tensors[output] for output in self.plan.outputs)

    def next_call(self) -> Velocity | None:
        """The next model call that is still to be made, what comes before it computed; None: there is no other."""
        for node in self.plan.nodes:
            if node in self.tensors:
                continue
            known = self.recorded(node)
            if isinstance(node, Velocity) and not (known and node not in self.live):
                return node
            self._compute(node, known)
        return None

    def recorded(self, node: Node) -> bool:
        """Whether the rollout recorded the node's value."""
        return is_faithful(node, self.faithful, self.trajectory.is_step)

    def take(self, node: Velocity, v: Tensor) -> None:
        """Takes in the velocity of a call that was made."""
        self._keep(node, v, self.recorded(node))

    def distances(self) -> dict[int, Tensor]:
        """{t: [batch]}: mean |x_t - prediction| of the leaps and advances that land on t; see `surgery.distances`."""
        found: dict[int, list[Tensor]] = {}
        for node in self.plan.nodes:
            if isinstance(node, Leap | Advance):
                t = time(node)
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


def rolled(trajectory: object) -> None:
    """Raises SamplerError for what is no trajectory."""
    if not isinstance(trajectory, Trajectory):
        raise SamplerError(
            f"received a {type(trajectory).__name__} for the trajectory: the order is (plan, trajectory, field), and "
            "the trajectory is what rollout() returns, the second of what sample() returns, or surgery.trajectory."
        )


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


def time(node: Node) -> int:
    """The time of a bound node."""
    assert isinstance(node.t, int), f"{node!r} was not bound by Plan.prepared"
    return node.t
