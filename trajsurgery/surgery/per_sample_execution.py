"""Per-sample plans: one model call serves one call of every sample's plan, each at its own time."""

from __future__ import annotations

import torch
from torch import Tensor

from trajsurgery.errors import PlanError
from trajsurgery.plans.nodes import Node, Velocity
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.execution import Execution, check_trajectory
from trajsurgery.surgery.parameters import Fields
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.validation import Generators
from trajsurgery.surgery.velocity_calls import ModelCall, Run, Way, velocity_at


def start_run(
    plan: Plan | PerSample, trajectory: Trajectory, generator: Generators = None, gradient: bool = True
) -> Run:
    """Return the execution of a plan, or of a plan for each sample, on a whole trajectory."""
    if isinstance(plan, PerSample):
        return PerSampleExecution(plan, trajectory, generator, gradient)
    return Execution(plan, trajectory, generator, gradient)


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
