"""One run of a plan: computes the value of each node once, as soon as its inputs exist.

With a plan for each sample, one model call serves one call of every sample's plan, each at its own time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.plans.graph import faithful, is_faithful, needs_gradient, reached, trained
from trajsurgery.plans.nodes import Advance, Leap, Node, Velocity
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.node_values import node_value
from trajsurgery.surgery.parameters import Fields
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.validation import Generators, check_generator
from trajsurgery.surgery.velocity_calls import ModelCall, Run, Way, velocity_at


class Execution:
    """The values of a plan's nodes on a trajectory that may still grow.

    `settle` computes everything that needs no model call, and is called as the rollout proceeds; `adopt` takes a call's
    velocity, such as one of the rollout's own; `finish` makes the remaining calls.
    """

    def __init__(self, plan: Plan, trajectory: Trajectory, generator: Generators = None, gradient: bool = True) -> None:
        check_plan(plan)
        check_trajectory(trajectory)
        check_generator(generator)
        self.plan = plan.prepared(trajectory.steps)
        self.trajectory = trajectory
        self.generator = generator
        outputs = self.plan.outputs
        self.live: set[Node] = needs_gradient(outputs) & set(reached(outputs)) if gradient else set()
        self.sources: list[Node] = trained(outputs) if gradient else []
        self.tensors: dict[Node, Tensor] = {}
        self.faithful: set[Node] = set()

    def settle(self) -> None:
        """Compute every node that is ready without a model call."""
        for node in self.plan.nodes:
            if node not in self.tensors and self._is_ready(node) and not self._needs_call(node):
                self._compute(node)

    def wanted(self, t: int) -> Velocity | None:
        """Return the plan's call that the rollout's own call at t can serve, once x_t is recorded."""
        calls = (node for node in self.sources if isinstance(node, Velocity) and node.t == t)
        pending = (call for call in calls if call not in self.tensors and call.x in self.tensors)
        return next((call for call in pending if self.is_recorded(call)), None)

    def forget(self, t: int) -> None:
        """Drop what was computed at t, because the loop changed x_t afterwards."""
        for node in [node for node in self.tensors if node.t == t]:
            del self.tensors[node]
            self.faithful.discard(node)

    def adopt(self, node: Node, value: Tensor) -> None:
        """Take a value, such as the velocity of a call, as the node's."""
        if self.is_recorded(node):
            self.faithful.add(node)
        self.tensors[node] = value if node in self.live else value.detach()

    def finish(self, fields: Fields, way: Way) -> tuple[Tensor, ...]:
        """Return the outputs, making the remaining model calls that the gradient reaches in this way."""
        while (node := self.next_call()) is not None:
            t = int(node.t)
            value = self.trajectory.velocity(t) if self.is_recorded(node) else None
            call = ModelCall(fields, node.field, self.trajectory, t, value)
            self.adopt(node, velocity_at(call, way, self.tensors[node.x], node in self.live))
        return tuple(self.tensors[output] for output in self.plan.outputs)

    def next_call(self) -> Velocity | None:
        """Return the next model call to make, computing what comes before it; None if there is none."""
        for node in self.plan.nodes:
            if node not in self.tensors:
                if isinstance(node, Velocity) and self._needs_call(node):
                    return node
                self._compute(node)
        return None

    def is_recorded(self, node: Node) -> bool:
        """Whether the rollout recorded the node's value."""
        return is_faithful(node, self.faithful, self.trajectory.is_step)

    def distances(self) -> dict[int, Tensor]:
        """Return {t: [batch]}: mean |x_t - prediction| of what lands on t; see `trajsurgery.distances`."""
        landings = [node for node in self.plan.nodes if isinstance(node, Leap | Advance)]
        distances: dict[int, Tensor] = {}
        for t in sorted({int(node.t) for node in landings}, reverse=True):
            if t in self.trajectory.latents:  # the rollout may end before
                real = self.trajectory[t]
                wide = real.to(torch.promote_types(real.dtype, torch.float32))
                predictions = [
                    self.tensors[node].detach() for node in landings if node.t == t and node not in self.faithful
                ]
                misses = [(wide - prediction).abs().reshape(len(real), -1).mean(1) for prediction in predictions]
                distances[t] = torch.stack(misses).mean(0) if misses else real.new_zeros(len(real))
        return distances

    def _is_ready(self, node: Node) -> bool:
        """Whether the node's parents are computed, and what it reads from the trajectory is recorded."""
        if node.op in ("recorded", "velocity"):
            recorded = node.t in self.trajectory.velocities
        else:
            recorded = (0 if node.op in ("renoise", "recover") else node.t) in self.trajectory.latents
        return recorded and all(parent in self.tensors for parent in node.parents)

    def _needs_call(self, node: Node) -> bool:
        return isinstance(node, Velocity) and (node in self.live or not self.is_recorded(node))

    def _compute(self, node: Node) -> None:
        with torch.set_grad_enabled(node in self.live):
            recorded = self.is_recorded(node)
            self.adopt(node, node_value(node, self.tensors, self.trajectory, recorded, self.generator))


class PerSampleExecution:
    """Executions of the samples' plans that wait for each other at every model call.

    The field is always called with the whole batch in order, since it may hold conditions of its samples. A sample
    whose plan has no call left gets the rollout's latent, and no gradient.
    """

    def __init__(
        self, plan: PerSample, trajectory: Trajectory, generator: Generators = None, gradient: bool = True
    ) -> None:
        check_trajectory(trajectory)
        batch = len(next(iter(trajectory.latents.values())))
        if len(plan.plans) != batch:
            raise PlanError(
                f"PerSample holds {len(plan.plans)} plans for a batch of {batch}: give one for each sample."
            )
        self.trajectory = trajectory
        self.samples = [Execution(each, trajectory.sample(i), generator, gradient) for i, each in enumerate(plan.plans)]
        self.sources: list[Node] = [node for sample in self.samples for node in sample.sources]

    def finish(self, fields: Fields, way: Way) -> tuple[Tensor, ...]:
        """Return the outputs, [batch, *latent], making the model calls that the gradient reaches in this way."""
        while calls := self._wanted():
            self._call(calls, fields, way)
        rows = [[sample.tensors[output] for output in sample.plan.outputs] for sample in self.samples]
        with torch.set_grad_enabled(bool(self.sources)):
            return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))

    def distances(self) -> dict[int, Tensor]:
        """Return {t: [batch]} as `Execution.distances`; NaN for samples whose plans do not land on t."""
        distances_of_samples = [sample.distances() for sample in self.samples]
        nowhere = self.trajectory.sigmas.new_full((1,), torch.nan)
        times = sorted(set[int]().union(*distances_of_samples), reverse=True)
        return {t: torch.cat([misses.get(t, nowhere) for misses in distances_of_samples]) for t in times}

    def _wanted(self) -> dict[int, Velocity]:
        """Return {sample: its plan's next model call}, for those that call the same field."""
        next_calls = {i: node for i, sample in enumerate(self.samples) if (node := sample.next_call()) is not None}
        names = [node.field for node in next_calls.values()]
        return {i: node for i, node in next_calls.items() if node.field == names[0]}

    def _call(self, calls: dict[int, Velocity], fields: Fields, way: Way) -> None:
        """Make one model call for the samples that need one."""
        first = next(iter(calls.values()))
        times = [int(calls.get(i, first).t) for i in range(len(self.samples))]
        live = any(node in self.samples[i].live for i, node in calls.items())
        inputs = [s.tensors[calls[i].x] if i in calls else s.trajectory[times[i]] for i, s in enumerate(self.samples)]
        value = None
        if all(self.samples[i].is_recorded(node) for i, node in calls.items()):
            value = torch.cat([s.trajectory.velocity(t) for s, t in zip(self.samples, times, strict=True)])
        t = times[0] if len(set(times)) == 1 else tuple(times)
        call = ModelCall(fields, first.field, self.trajectory, t, value)
        with torch.set_grad_enabled(live):
            v = velocity_at(call, way, torch.cat(inputs), live)
            for i, node in calls.items():
                self.samples[i].adopt(node, v[i : i + 1])


def start_run(
    plan: Plan | PerSample, trajectory: Trajectory, generator: Generators = None, gradient: bool = True
) -> Run:
    """Return the execution of a plan, or of a plan for each sample, on a whole trajectory."""
    if isinstance(plan, PerSample):
        return PerSampleExecution(plan, trajectory, generator, gradient)
    return Execution(plan, trajectory, generator, gradient)


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
    recorded, differentiable = faithful(plan.outputs, lambda _: False), needs_gradient(plan.outputs)
    for node in trained(plan.outputs):
        if isinstance(node, Velocity) and node.t == steps and node in recorded and node.x not in differentiable:
            return node
    return None
