"""Runs of single samples, side by side: a model call serves one call of every sample's plan, at its own time."""

from __future__ import annotations

import torch
from torch import Tensor

from trajsurgery.errors import PlanError
from trajsurgery.plans.nodes import Node, Velocity
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.execution import Execution, rolled, time
from trajsurgery.surgery.parameters import Fields
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.velocity_calls import Call, Run, asked


def run(
    plan: Plan | PerSample, trajectory: Trajectory, generator: torch.Generator | None = None, gradient: bool = True
) -> Run:
    """The execution of a plan, or of one for each sample, on a whole trajectory."""
    if isinstance(plan, PerSample):
        return Lockstep(plan, trajectory, generator, gradient)
    return Execution(plan, trajectory, generator, gradient)


class Lockstep:
    """Executions of the samples' plans that wait for each other at every model call.

    The field is always called with the whole batch in its order, since it may hold conditions of its samples. A sample
    whose plan has no call left gets the rollout's own latent, and no gradient.

    Raises:
        PlanError: another number of plans than samples; a plan that does not fit the trajectory.
    """

    def __init__(
        self, plan: PerSample, trajectory: Trajectory, generator: torch.Generator | None = None, gradient: bool = True
    ) -> None:
        rolled(trajectory)
        batch = len(next(iter(trajectory.latents.values())))
        if len(plan.plans) != batch:
            raise PlanError(
                f"PerSample holds {len(plan.plans)} plans for a batch of {batch}: give one for each sample."
            )
        self.trajectory = trajectory
        self.samples = [Execution(each, trajectory.sample(i), generator, gradient) for i, each in enumerate(plan.plans)]

    @property
    def live(self) -> set[Node]:
        """The nodes that a gradient reaches, of all plans."""
        return set[Node]().union(*(sample.live for sample in self.samples))

    @property
    def calls(self) -> list[Velocity]:
        """The calls that a gradient reaches, of all plans."""
        return [node for sample in self.samples for node in sample.calls]

    def finish(self, fields: Fields, call: Call) -> tuple[Tensor, ...]:
        """The outputs, [batch, *latent], with `call` for the model calls that the gradient reaches."""
        while wanted := self._wanted():
            self._call(wanted, fields, call)
        rows = [[sample.tensors[output] for output in sample.plan.outputs] for sample in self.samples]
        with torch.set_grad_enabled(bool(self.live)):
            return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))

    def distances(self) -> dict[int, Tensor]:
        """{t: [batch]} as `Execution.distances`; NaN for the samples whose plans do not land on t."""
        found = [sample.distances() for sample in self.samples]
        nowhere = self.trajectory.sigmas.new_full((1,), torch.nan)
        times = sorted(set[int]().union(*found), reverse=True)
        return {t: torch.cat([misses.get(t, nowhere) for misses in found]) for t in times}

    def _wanted(self) -> dict[int, Velocity]:
        """{sample: its plan's next model call}, of those that call the same field."""
        found = {i: node for i, sample in enumerate(self.samples) if (node := sample.next_call()) is not None}
        names = [node.field for node in found.values()]
        return {i: node for i, node in found.items() if node.field == names[0]}

    def _call(self, wanted: dict[int, Velocity], fields: Fields, call: Call) -> None:
        """One model call for the samples that want one."""
        first = next(iter(wanted.values()))
        times = [time(wanted.get(i, first)) for i in range(len(self.samples))]
        live = any(node in self.samples[i].live for i, node in wanted.items())
        given = [s.tensors[wanted[i].x] if i in wanted else s.trajectory[times[i]] for i, s in enumerate(self.samples)]
        known = None
        if all(self.samples[i].recorded(node) for i, node in wanted.items()):
            known = torch.cat([s.trajectory.velocity(t) for s, t in zip(self.samples, times, strict=True)])
        t = times[0] if len(set(times)) == 1 else tuple(times)
        sigma = self.trajectory.sigma(t) if isinstance(t, int) else torch.stack([*map(self.trajectory.sigma, t)])
        recorded = self.trajectory.velocities.get(times[0])
        with torch.set_grad_enabled(live):
            v = asked(fields, first.field, call, torch.cat(given), sigma, t, recorded, known, live)
            for i, node in wanted.items():
                self.samples[i].take(node, v[i : i + 1])
