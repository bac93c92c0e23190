"""Any diffusers flow pipeline, unmodified: `operate(pipe, plan)`.

For the time of the block the pipe gets a one-off subclass whose `__call__` records its arguments and wraps the
scheduler's `set_timesteps` and `step` while it runs. `step` sees every x_t and v_t, decides whether the next model call
runs with grad, and returns as the next sample the plan's own node for it: the sampler's value, bit for bit.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from trajsurgery import check
from trajsurgery.errors import SamplerError, SurgeryError
from trajsurgery.execute import Execution, Memory, first_call, known, outputs, planned
from trajsurgery.node import Noise, Velocity
from trajsurgery.plan import Plan
from trajsurgery.reentry import PipelineField, Record, wrapped
from trajsurgery.trajectory import Trajectory, check_sigmas

_ONE_OFF = "_operated_by_trajsurgery"


def operate(
    pipe: Any, plan: Plan | None = None, memory: Memory = "retain", generator: torch.Generator | None = None
) -> Surgery:
    """A block in which the pipe's calls carry the plan's gradient; the images are the plain call's, bit for bit.

        with operate(pipe, leapalign(18, 7)) as surgery:
            images = pipe(prompt, num_inference_steps=25, output_type="pt").images
        reward(images, prompt).sum().backward()

    Args:
        pipe: any diffusers pipeline with a flow-matching scheduler.
        plan: what the gradient may pass; without one the rollout is recorded only.
        memory: "retain" keeps the activations of the plan's calls, which are the rollout's own; "recompute" keeps none
            and makes the calls again in the backward pass, through the pipe itself.
        generator: draws the noises of renoised samples (torch's default if left out).

    Raises:
        SamplerError: no flow-matching scheduler; a block inside a block on one pipe.
        PlanError: no plan, or one with unbound names; an unknown `memory`; in the call: it has another number of steps.
    """
    known(memory)
    if plan is not None:
        planned(plan)
        check.bound(plan.outputs, plan.names)
    return Surgery(pipe, plan, memory, generator)


class Surgery:
    """What a call of the pipe inside the block left: the last call's, if there were several."""

    outputs: tuple[Tensor, ...]
    """The plan's outputs, [batch, *latent] as the loop holds them, with gradient."""
    trajectory: Trajectory
    """The rollout: it outlives the block and its plan."""
    field: PipelineField
    """The pipe as a velocity field, for `apply` and `backward` on the trajectory, also after the block."""
    distances: dict[int, Tensor]
    """{t: [batch]}: mean |x_t - prediction| of the plan's leaps, as `trajsurgery.distances`."""

    def __init__(self, pipe: Any, plan: Plan | None, memory: Memory, generator: torch.Generator | None) -> None:
        self.plan, self.generator = plan, generator
        self.memory: Memory = memory
        self._pipe, self._base = pipe, type(pipe)

    def decode(self, x: Tensor) -> Any:
        """Latents [batch, *latent] to images through the pipe's own tail, with gradient: for the later outputs."""
        return self.field.decode(x)

    def __getattr__(self, name: str) -> Any:
        if name in ("outputs", "distances") and self.plan is None:
            raise SurgeryError(
                f"surgery.{name} is a plan's: this block has none and records only, operate(pipe, plan)."
            )
        if name in Surgery.__annotations__:
            raise SurgeryError(f"surgery.{name} is there once the pipe has been called inside the block.")
        raise AttributeError(name)

    def __enter__(self) -> Surgery:
        self._base = type(self._pipe)
        if hasattr(self._base, _ONE_OFF):
            raise SamplerError(
                f"a block of operate() on this {self._base.__mro__[1].__name__} is open already. Close it first, or "
                "record once with operate(pipe) and run several plans on surgery.trajectory."
            )
        _flow_matching(self._pipe)
        members = {_ONE_OFF: True, "__call__": self._recorded_call(), "__module__": self._base.__module__}
        if hasattr(self._base, "encode_prompt"):
            members["encode_prompt"] = self._recorded_encoding()
        self._pipe.__class__ = type(self._base.__name__, (self._base,), members)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        one_off: Any = type(self._pipe)
        self._pipe.__class__ = self._base
        one_off.__call__ = one_off.encode_prompt = None  # they hold the tensors, and a class waits for the collector

    def _recorded_call(self) -> Any:
        @functools.wraps(self._base.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            record = Record.of(pipe, self._base, args, kwargs)
            with _Loop(self, record):
                return self._base.__call__(pipe, *args, **kwargs)

        return call

    def _recorded_encoding(self) -> Any:
        @functools.wraps(self._base.encode_prompt)
        def encode_prompt(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                found = self._base.encode_prompt(pipe, *args, **kwargs)
            if self._record is not None:
                self._record.encodings.append(found)
            return found

        return encode_prompt

    _record: Record | None = None
    """The record of the call that is under way."""


class _Loop:
    """One call of the pipe: the scheduler wrapped, the grad mode decided step by step, both put back."""

    def __init__(self, surgery: Surgery, record: Record) -> None:
        self.surgery, self.record = surgery, record
        self.scheduler = record.pipe.scheduler
        self.stop_watching = lambda: None
        self.sigmas: Tensor
        self.trajectory: Trajectory
        self.execution: Execution | None = None
        self.call: Velocity | None = None
        """The plan's call that the model's next one is."""
        self.given: Tensor | None = None
        """The sample that the loop was handed last."""
        self.version = 0
        """How often that sample had been changed in place by then."""
        self.t = -1

    def __enter__(self) -> None:
        self.before = {
            name: self.scheduler.__dict__[name] for name in ("step", "set_timesteps") if name in self.scheduler.__dict__
        }
        self.mode = torch.is_grad_enabled()
        self.surgery._record = self.record  # pyright: ignore[reportPrivateUsage]
        for name, around in (("set_timesteps", self._set_timesteps), ("step", self._step)):
            self.scheduler.__dict__[name] = wrapped(getattr(self.scheduler, name), around)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for name in ("step", "set_timesteps"):
            self.scheduler.__dict__.pop(name, None)
        self.scheduler.__dict__.update(self.before)
        self.stop_watching()
        self.surgery._record = None  # pyright: ignore[reportPrivateUsage]
        torch.set_grad_enabled(self.mode)
        if kind is None and self.t < 0:
            raise SamplerError(
                f"{self.record.base.__name__} never called its scheduler's set_timesteps: nothing to follow."
            )
        if kind is None and self.t > 0:
            raise SamplerError(
                f"the loop made {len(self.sigmas) - 1 - self.t} of its schedule's {len(self.sigmas) - 1} steps: it "
                "runs a part of it (strength < 1) or was interrupted, which operate() can't follow yet. Run all of it."
            )

    def _set_timesteps(self, set_timesteps: Any, *args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        self.sigmas = _sigmas(self.scheduler)
        self.t = len(self.sigmas) - 1
        self.record.times = self.sigmas.tolist()
        plan = self.surgery.plan
        if plan is not None:
            if torch.is_inference_mode_enabled():
                raise SamplerError("a plan's gradient can't be kept under torch.inference_mode(): leave that block.")
            plan = plan.prepared(self.t)
            self.call = first_call(plan, self.t) if self.surgery.memory == "retain" else None
        self.stop_watching()
        self.record.templates.clear()
        self.stop_watching = self.record.watch()
        torch.set_grad_enabled(self.call is not None)

    def _step(self, step: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._record_step(model_output, sample)
        torch.set_grad_enabled(False)
        found = step(model_output.detach(), timestep, sample.detach(), *args, **kwargs)
        self.t -= 1
        real = found[0] if isinstance(found, tuple) else found.prev_sample
        self.trajectory.latents[self.t] = real
        given = self._next(real)
        self.given, self.version = given, given._version if self.execution is not None else 0
        if isinstance(found, tuple):
            return (given, *found[1:])
        found.prev_sample = given
        return found

    def _record_step(self, v: Tensor, sample: Tensor) -> None:
        """x_t as the loop hands it over (masks and callbacks change it after the step before), v_t after guidance."""
        if self.t == len(self.sigmas) - 1:
            self.stop_watching()
            self._start(sample)
        elif self.given is not None and (
            sample is not self.given or (self.execution is not None and sample._version != self.version)
        ):
            self._change(self.given, sample.detach())
        self.trajectory.velocities[self.t] = v.detach()
        if self.execution is not None:
            self.execution.settle()
            if self.call is not None:
                self.execution.adopt(self.call, v)

    def _change(self, given: Tensor, sample: Tensor) -> None:
        """The loop went on with another x_t than it was given: what was computed from that one is computed anew.

        The model's call is the plan's only if its input still is: it depends on what was given through the change.
        """
        same = sample is not given and sample.dtype == given.dtype and torch.equal(sample, self.trajectory[self.t])
        self.trajectory.replace(self.t, sample)
        if self.execution is None:
            return
        self.execution.forget(self.t)
        self.execution.settle()
        if not same and (given.requires_grad or self.execution.wanted(self.t) is not self.call):
            self.call = None

    def _start(self, sample: Tensor) -> None:
        plan = self.surgery.plan
        start = sample.detach()
        if plan is not None and any(isinstance(node, Noise) for node in plan.nodes):
            start = start.clone().requires_grad_()
        self.trajectory = Trajectory(self.sigmas, {self.t: sample.detach()}, {}, euler=None, start=start)
        self.execution = None if plan is None else Execution(plan, self.trajectory, self.surgery.generator)

    def _next(self, real: Tensor) -> Tensor:
        """The sample for the loop: the plan's node where its next call is the plan's, else the sampler's own."""
        execution = self.execution
        if self.t == 0:
            return self._finish(real)
        if execution is None or self.surgery.memory != "retain":
            return real
        execution.settle()
        self.call = execution.wanted(self.t)
        torch.set_grad_enabled(self.call is not None)
        return real if self.call is None else execution.tensors[self.call.x]

    def _finish(self, real: Tensor) -> Tensor:
        """The plan's outputs; the first is what the pipeline decodes, with grad where its images can have one."""
        surgery, execution = self.surgery, self.execution
        surgery.trajectory, surgery.field = self.trajectory, PipelineField(self.record)
        if surgery.plan is None or execution is None:
            return real
        surgery.outputs = outputs(surgery.plan, self.trajectory, surgery.field, surgery.memory, execution, None)
        surgery.distances = execution.distances()
        torch.set_grad_enabled(self.record.arguments.get("output_type", "pt") in ("pt", "latent"))
        return surgery.outputs[0]


def _flow_matching(pipe: Any) -> None:
    """Raises SamplerError before any work if the pipe's scheduler can't be a flow-matching one."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(pipe, "components"):
        raise SamplerError(
            f"operate() received a {type(pipe).__name__}: it takes a diffusers pipeline, with a scheduler."
        )
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type", "flow_prediction")
    sigmas = getattr(scheduler, "sigmas", None)
    above = isinstance(sigmas, Tensor) and not config.get("use_flow_sigmas") and float(sigmas.max()) > 1 + 1e-3
    if sigmas is None or above or kind != "flow_prediction":
        raise SamplerError(
            f"{type(scheduler).__name__} is no flow-matching scheduler: a leap needs a velocity dx/dsigma and sigmas "
            "in [0, 1]. Use FlowMatchEulerDiscreteScheduler, or UniPC or DPM-Solver++ with use_flow_sigmas=True and "
            "prediction_type='flow_prediction'."
        )
    if getattr(scheduler, "order", 1) > 1:
        raise SamplerError(
            f"{type(scheduler).__name__} makes more than one call a step, which operate() can't follow yet. Use "
            "FlowMatchEulerDiscreteScheduler."
        )


def _sigmas(scheduler: Any) -> Tensor:
    """The sampler's [T + 1] times, from the scheduler."""
    sigmas, steps = scheduler.sigmas.detach().clone(), len(scheduler.timesteps)
    if len(sigmas) != steps + 1:
        raise SamplerError(
            f"{type(scheduler).__name__} has {len(sigmas)} sigmas for {steps} timesteps; operate() follows schedulers "
            "that have one more. Run the whole schedule, with FlowMatchEulerDiscreteScheduler."
        )
    check_sigmas(sigmas)
    return sigmas
