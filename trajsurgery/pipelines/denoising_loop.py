"""Follows one call of a pipeline: reads its scheduler steps, and decides which model calls run with gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trajsurgery.errors import PlanError, SamplerError
from trajsurgery.pipelines.call_record import CallRecord, skipped_calls
from trajsurgery.pipelines.guidance import GuidanceGradient, GuidancePasses
from trajsurgery.pipelines.pipeline_field import PipelineField
from trajsurgery.pipelines.scheduler import (
    Schedule,
    calling_first,
    first_timetable_entry,
    is_euler_step,
    remember_sigmas,
    reroute,
    shadow_attribute,
    step_output,
)
from trajsurgery.plans import nodes
from trajsurgery.plans.graph import last_needed_time
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.execution import Execution, first_call
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.validation import Generators
from trajsurgery.surgery.velocity_calls import IN_ROLLOUT, Memory, cut, run_outputs, split_call


@dataclass(frozen=True)
class OperateOptions:
    """The arguments of `operate`."""

    plan: Plan | None
    memory: Memory
    generator: Generators
    guidance: GuidanceGradient
    whole: bool
    keep: Collection[int] | None


class DenoisingLoop:
    """A context around the pipeline's `__call__`; `results` holds what `Surgery` shows."""

    def __init__(self, options: OperateOptions, record: CallRecord) -> None:
        self.options, self.record = options, record
        self.results: dict[str, Any] = {}
        self.scheduler = record.pipe.scheduler
        self.stack: contextlib.ExitStack
        self.passes: GuidancePasses
        self.ended = False
        """No output of the plan needs the rest of the rollout: its model calls are left out."""
        self.trajectory: Trajectory
        self.execution: Execution | None = None
        self.plan: Plan | None = None
        """The plan, bound to the loop's number of steps."""
        self.call: nodes.Velocity | None = None
        """The plan's call that the model's next one is."""
        self.given: Tensor | None = None
        """The sample that the loop was handed last."""
        self.version = 0
        """How often that sample had been changed in place by then."""
        self.kept: set[nodes.Time | None] | None = None
        """The times whose x_t and v_t stay in the trajectory; None: all."""
        self.count = -1
        """The calls of `scheduler.step` so far; -1 before there is a schedule."""
        self.t = -1

    def __enter__(self) -> DenoisingLoop:
        pipe = self.record.pipe
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # restores it
            stack.enter_context(reroute(self.scheduler, set_timesteps=self._set_timesteps, step=self._step))
            stack.enter_context(self.record.encoding())
            stack.enter_context(self.record.preparing())
            progress_bar = calling_first(self._begin, pipe.progress_bar)
            stack.enter_context(shadow_attribute(pipe, "progress_bar", progress_bar))
            stack.callback(self.record.watching.close)
            self.passes = self.record.guidance_passes()
            stack.callback(self.passes.stop)
            if self.options.plan is not None and self.options.memory in IN_ROLLOUT:
                for module in self.record.modules():
                    stack.enter_context(module.register_forward_pre_hook(_copy_arguments, with_kwargs=True))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.stack.close()
        name = self.record.base.__name__
        if kind is not None:
            return
        if self.count < 0:
            raise SamplerError(f"{name} never called its scheduler's set_timesteps: nothing to follow.")
        if self.count == 0:
            raise SamplerError(
                f"{name} set its scheduler's timesteps and never called its step: its loop steps copies of the "
                "scheduler, or by a rule of its own, which operate() can't follow."
            )
        if self.t > 0:
            steps = self.record.schedule.steps
            raise SamplerError(
                f"the loop ended after {steps - self.t} of its {steps} steps: it was interrupted, or leaves the rest "
                "to another pipeline. operate() follows loops that run to the end of their schedule."
            )

    def _set_timesteps(self, set_timesteps: Any, *args: Any, **kwargs: Any) -> None:
        if self.count > 0:
            raise SamplerError(
                f"{self.record.base.__name__} runs a schedule again within one call (in sections, or at a second "
                "resolution): operate() follows one loop a call."
            )
        set_timesteps(*args, **kwargs)
        remember_sigmas(self.scheduler, (args, kwargs))
        self.count = 0
        if self.options.plan is not None and torch.is_inference_mode_enabled():
            raise SamplerError("a plan's gradient can't be kept under torch.inference_mode(): leave that block.")
        self.record.begin()
        self.record.watch()

    def _begin(self, *_: Any, **shown: Any) -> None:
        """The pipeline creates its progress bar, so the loop is next: prepare its first model call."""
        if self.count != 0:
            return
        self.record.announced = True
        self.record.begin()
        plan = self.options.plan
        if plan is None or self.options.memory not in IN_ROLLOUT:
            return
        with contextlib.suppress(PlanError, SamplerError):  # told at the first step, when T is known for certain
            steps = Schedule.of(self.scheduler, first_timetable_entry(self.scheduler)).steps
            steps = min(steps, shown.get("total") or steps)
            self.call = first_call(plan.prepared(steps), steps)
        torch.set_grad_enabled(self.call is not None)

    def _step(self, step: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.set_grad_enabled(False)
        if self.ended:
            self.count += 1
            last = self.count == self.record.schedule.calls
            return step_output(self._show() if last else sample, **kwargs)
        output = step(model_output.detach(), timestep, sample.detach(), *args, **kwargs)
        real = output[0] if isinstance(output, tuple) else output.prev_sample
        if self.count == 0:
            self._start(sample)
        schedule = self.record.schedule
        self.record.timesteps.append(timestep)
        if self.count == 0:
            self.record.trim(4 * sample.numel())
        if self.count in schedule.starts:
            self._record_step(model_output, sample)
            if not args and is_euler_step(step, self.scheduler, kwargs):
                self.trajectory.note_euler_step(self.t)
            if not self.options.whole and self.plan is not None and 1 < self.t == last_needed_time(self.plan.nodes):
                self._end(self.plan)
                return output
        landed, self.count = schedule.lands(self.count), self.count + 1
        if not landed:  # the next call of the model is at no time of the rollout's
            self.given = self.call = None
            return output
        self.t -= 1
        self.trajectory.latents[self.t] = real
        if self.kept is not None and self.t + 1 not in self.kept:
            self.trajectory.drop(self.t + 1)
        next_sample = self._next(real)
        self.given, self.version = next_sample, next_sample._version if self.execution is not None else 0
        if isinstance(output, tuple):
            return (next_sample, *output[1:])
        output.prev_sample = next_sample
        return output

    def _start(self, sample: Tensor) -> None:
        """The loop's first step is made: its position in the timetable is known, and with it T."""
        schedule = self.record.schedule = Schedule.of(self.scheduler, first_timetable_entry(self.scheduler))
        self.t = schedule.steps
        start = self.record.start = sample.detach().clone()  # it may be a buffer that is written to again
        self.record.note_own_latents(sample)
        if self.options.plan is not None:
            self.record.stateless()
            try:
                self.plan = self.options.plan.prepared(self.t)
            except PlanError as error:
                if self.t == schedule.whole:
                    raise
                raise PlanError(
                    f"{error} The loop runs the last {self.t} of its schedule's {schedule.whole} steps (strength < 1): "
                    f"write the plan for T = {self.t}.",
                    error.rules,
                ) from error
            if any(isinstance(node, nodes.Noise) for node in self.plan.nodes):
                start = start.clone().requires_grad_()
        self.trajectory = Trajectory(
            schedule.sigmas, {self.t: self.record.start}, {}, schedule.interpolant(), euler=None, start=start
        )
        self.results["trajectory"], self.results["field"] = self.trajectory, PipelineField(self.record, self.trajectory)
        if self.options.keep is not None:
            self.kept = {self.t, *self.options.keep, *(node.t for node in (self.plan.nodes if self.plan else ()))}
        if self.plan is not None:
            self.execution = Execution(self.plan, self.trajectory, self.options.generator)
        if self.call is not None and self.call.t != self.t:
            self.call = None

    def _record_step(self, v: Tensor, sample: Tensor) -> None:
        """Record x_t as the loop passes it (masks and callbacks change it after a step), and v_t after guidance."""
        if self.given is not None and (
            sample is not self.given or (self.execution is not None and sample._version != self.version)
        ):
            self._change(self.given, sample)
        self.trajectory.velocities[self.t] = v.detach()
        if self.execution is not None:
            self.execution.settle()
            if self.call is not None:
                self.passes.tell(v)
                if self.options.memory == "split":
                    start = sample if self.given is None else self.given
                    v = split_call(self.execution.tensors[self.call.x], v, start)
                self.execution.adopt(self.call, v)
            else:
                self.passes.tell(v.detach())  # drops what a call left that is not the plan's after all

    def _change(self, given: Tensor, sample: Tensor) -> None:
        """The loop continued from another x_t than it received: compute again what depends on it.

        The model's call is the plan's only if its input still is: it depends on what the loop received through the
        change.
        """
        same = sample is not given and sample.dtype == given.dtype and torch.equal(sample, self.trajectory[self.t])
        if same and sample.requires_grad == given.requires_grad:
            return
        self.trajectory.replace(self.t, sample.detach().clone())  # it may be a buffer that is written to again
        if self.execution is None:
            return
        self.execution.forget(self.t)
        self.execution.settle()
        if given.requires_grad or self.execution.wanted(self.t) is not self.call:
            self.call = None

    def _next(self, real: Tensor) -> Tensor:
        """Return the next sample for the loop: the plan's node where its next call is the plan's, else the sampler's
        own.
        """
        execution = self.execution
        if self.t == 0:
            return self._finish(real)
        if execution is None or self.options.memory not in IN_ROLLOUT:
            return real
        execution.settle()
        self.call = execution.wanted(self.t)
        torch.set_grad_enabled(self.call is not None)
        if self.call is None:
            return real
        node = execution.tensors[self.call.x]
        return cut(node) if self.options.memory == "split" else node

    def _finish(self, real: Tensor) -> Tensor:
        """Return the sample that the pipeline decodes: the plan's first output, or the sampler's own."""
        self.record.watching.close()
        if self.plan is None:
            return real
        self._output(self.plan)
        return self._show()

    def _end(self, plan: Plan) -> None:
        """End the rollout here: the loop continues without model calls up to its own decoding."""
        self.record.watching.close()
        self._output(plan)
        self.ended, self.count = True, self.count + 1
        self.stack.enter_context(skipped_calls(self.record.templates))

    def _output(self, plan: Plan) -> None:
        assert self.execution is not None
        computed = run_outputs(self.results["field"], self.options.memory, self.execution, None)
        self.results["outputs"], self.results["distances"] = computed, self.execution.distances()

    def _show(self) -> Tensor:
        """Return the plan's first output, with grad where the pipeline's images can have one."""
        self.t = 0
        torch.set_grad_enabled(self.record.arguments.get("output_type", "pt") in ("pt", "latent"))
        return self.results["outputs"][0]


def _copy_arguments(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Copy arguments that a call keeps until the backward pass: some loops write the next latents into them."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(copied, (args, kwargs)) if torch.is_grad_enabled() else None
