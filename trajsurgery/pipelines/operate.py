"""Surgery on an unmodified diffusers pipeline: `operate(pipe, plan)`.

For the time of the block the pipeline gets a one-off subclass whose `__call__` records its arguments and reroutes the
scheduler's `set_timesteps` and `step`. `step` sees every x_t and v_t, decides whether the next model call runs with
grad, and returns the plan's own node as the next sample: the sampler's value, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from torch import Tensor

from trajsurgery.errors import SamplerError, SurgeryError
from trajsurgery.pipelines.call_record import CallRecord
from trajsurgery.pipelines.denoising_loop import DenoisingLoop, OperateOptions
from trajsurgery.pipelines.guidance import GuidanceGradient, check_guidance_gradient
from trajsurgery.pipelines.pipeline_field import PipelineField
from trajsurgery.pipelines.scheduler import check_flow_matching
from trajsurgery.plans import legality
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.execution import check_plan
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.surgery.validation import Generators
from trajsurgery.surgery.velocity_calls import Memory, check_memory

_ONE_OFF = "_operated_by_trajsurgery"


def operate(
    pipe: Any,
    plan: Plan | None = None,
    memory: Memory = "retain",
    generator: Generators = None,
    *,
    guidance_gradient: GuidanceGradient = "both",
    whole: bool = True,
    keep: Collection[int] | None = None,
) -> Surgery:
    """Return a context in which the pipeline's calls carry the plan's gradient; images are the plain call's, bit for
    bit.

        with operate(pipe, leapalign(18, 7)) as surgery:
            images = pipe(prompt, num_inference_steps=25, output_type="pt").images
        reward(images, prompt).sum().backward()

    T is the number of steps that the loop really runs: image-to-image pipelines run only the tail of their schedule,
    and a sampler that calls the model twice a step (Heun) counts intervals, with the velocities of the first call. On a
    sampler whose steps are not Euler's (multistep, stochastic) every leap is a prediction, as is `leap(t - 1)`:
    `print(plan.cost(surgery.trajectory))` says "unfaithful" and where.

    Args:
        pipe: any diffusers pipeline with a flow-matching scheduler.
        plan: which edges pass the gradient; without one the rollout is only recorded.
        memory: "retain" keeps the activations of the plan's calls, which are the rollout's own; "recompute" keeps none
            and makes the calls again in the backward pass, through the pipeline itself. "split" is retain with a graph
            for each call: parameter gradients go into `.grad` call by call, and no second one is ever held.
        generator: draws the noises of renoised samples (one generator, or one for each
            sample; by default torch's global one).
        guidance_gradient: for classifier-free guidance, v = u + s (c - u). "both": both passes are in the graph.
            "conditional": the conditional one alone, s dc/dtheta; u is a constant. The values are the same.
        whole: False ends the rollout at the last time that an output needs (ReFL, DRTune): no later model call is made,
            and the trajectory and `distances` hold no later times.
        keep: the times whose x_t and v_t the trajectory keeps, beside T, 0 and those of the plan; by default all. Those
            of a video are large.

    Raises:
        SamplerError: no flow-matching scheduler; a block inside a block on one pipeline.
        PlanError: no plan, or unbound names; an unknown `memory`; during the call: another number of steps.
        SurgeryError: an unknown `guidance_gradient`.
    """
    check_memory(memory)
    check_guidance_gradient(guidance_gradient)
    if plan is not None:
        check_plan(plan)
        legality.check_bound(plan.outputs, plan.names)
    return Surgery(pipe, OperateOptions(plan, memory, generator, guidance_gradient, whole, keep))


class Surgery:
    """The results of a pipeline call inside the block: the last call's, if there were several."""

    outputs: tuple[Tensor, ...]
    """The plan's outputs, [batch, *latent] as the loop holds them, with gradient."""
    trajectory: Trajectory
    """The rollout. It may be used after the block, and with other plans."""
    field: PipelineField
    """The pipeline as a velocity field, for `apply` and `backward` on the trajectory, also after the block."""
    distances: dict[int, Tensor]
    """{t: [batch]}: mean |x_t - prediction| of the plan's leaps, as `trajsurgery.distances`."""

    def __init__(self, pipe: Any, options: OperateOptions) -> None:
        self.plan, self._options = options.plan, options
        self._pipe, self._base = pipe, type(pipe)

    def decode(self, x: Tensor) -> Any:
        """Decode latents [batch, *latent] through the pipeline's own tail, with gradient: for the later outputs."""
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
        check_flow_matching(self._pipe)
        check_memory(self._options.memory, self._pipe.components)
        members = {_ONE_OFF: True, "__call__": self._recorded_call(), "__module__": self._base.__module__}
        self._pipe.__class__ = type(self._base.__name__, (self._base,), members)
        return self

    def __exit__(self, *_: object) -> None:
        one_off: Any = type(self._pipe)
        self._pipe.__class__ = self._base
        one_off.__call__ = None  # it holds the tensors, and a class waits for the collector

    def _recorded_call(self) -> Any:
        @functools.wraps(self._base.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            record = CallRecord.of(pipe, self._base, args, kwargs, self._options.guidance)
            loop = DenoisingLoop(self._options, record)
            try:
                with loop:
                    args, kwargs = record.with_recorded_callback(args, kwargs)
                    return self._base.__call__(pipe, *args, **kwargs)
            finally:
                self.__dict__.update(loop.results)

        return call
