"""The public functions of a plan on tensors: `rollout`, `apply`, `sample`, `values`, `backward`, `distances`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import SamplerError
from trajsurgery.plans.interpolants import Interpolant, RectifiedFlow
from trajsurgery.plans.nodes import Noise
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery import velocity_calls
from trajsurgery.surgery.autograd_functions import backward_of_call
from trajsurgery.surgery.execution import Execution, start_run
from trajsurgery.surgery.parameters import Fields, Params, field_named, has_trainable_parameters, trainable_only
from trajsurgery.surgery.trajectory import Trajectory, as_sigmas
from trajsurgery.surgery.validation import Generators, call_field, change_count, check_finite, match_cotangents
from trajsurgery.surgery.velocity_calls import IN_ROLLOUT, Memory, ModelCall, check_memory, retained_call, run_outputs

Outputs = Tensor | tuple[Tensor, ...]


def rollout(
    field: Fields,
    noise: Tensor,
    sigmas: Tensor | Sequence[float],
    interpolant: Interpolant | None = None,
    *,
    check: bool = True,
) -> Trajectory:
    """Run the sampler, x + dsigma v, without gradient, and record every x_t and v_t.

    Args:
        field: field(x, sigma) -> v, x and v [batch, *latent], sigma 0-dim; or a mapping of fields, the default one
            under None.
        noise: x_T, [batch, *latent]. If it requires a gradient, `noise()` in a plan passes it one.
        sigmas: [T + 1] strictly monotone times in [0, 1], from noise to image.
        interpolant: what leaps assume, rectified flow by default. The rollout itself always steps by Euler.
        check: whether to look for NaN and Inf at the end, which waits for the device once.

    Raises:
        SamplerError: sigmas of a wrong shape, order or range; a field that returns no velocity; NaN or Inf.
    """
    trajectory = _new_trajectory(noise, sigmas, interpolant)
    _run_sampler(field, trajectory, check)
    return trajectory


def sample(
    plan: Plan,
    field: Fields,
    noise: Tensor,
    sigmas: Tensor | Sequence[float],
    interpolant: Interpolant | None = None,
    *,
    memory: Memory = "retain",
    generator: Generators = None,
    params: Params = None,
    check: bool = True,
) -> tuple[Outputs, Trajectory]:
    """Run rollout and surgery in one pass: the plan's faithful calls are the rollout's own, so they cost no extra call.

    Args:
        check: as in `rollout`; False in a training loop that checks its loss anyway.

    Returns:
        The outputs as `apply` gives them, and the trajectory as `rollout` does.

    Raises:
        PlanError: the plan does not fit T = len(sigmas) - 1 steps, or has unbound names.
        SamplerError: as `rollout` and `apply`.
    """
    check_memory(memory, field)
    trajectory = _new_trajectory(noise, sigmas, interpolant)
    execution = Execution(plan, trajectory, generator)
    trained = None if params is None else trainable_only(params, required=False)
    in_rollout = execution if memory in IN_ROLLOUT else None
    _run_sampler(field, trajectory, check, in_rollout, memory == "split", trained)
    return _unwrap(run_outputs(field, memory, execution, trained)), trajectory


def apply(
    plan: Plan | PerSample,
    trajectory: Trajectory,
    field: Fields,
    memory: Memory = "retain",
    *,
    generator: Generators = None,
    params: Params = None,
) -> Outputs:
    """Return the plan's outputs on a recorded trajectory, with the plan's gradient.

    A trajectory belongs to the weights that made it: after an optimizer step, recorded velocities are still the old
    weights'. The noise of a renoised sample is drawn once for a trajectory; plans that name the same (draw, to) share
    it.

    Args:
        plan: one for the batch, or `PerSample`: one for each sample.
        memory: "retain" keeps the activations of every velocity call. "recompute" keeps none and runs the model again
            in the backward pass, one call at a time. "split" gives each call a graph of its own, whose backward pass
            adds into `.grad`: no second parameter gradient is held, and `torch.autograd.grad` for parameters is not
            possible. Both are first-order reverse mode only, and fall back to retain under a torch.func transform or
            forward-mode AD.
        generator: draws the noises of renoised samples that the trajectory does not hold yet: one generator, or one for
            each sample (by default torch's global one).
        params: what trains; by default `field.parameters()`, or the leaves of the autograd graph of one call.

    Returns:
        [batch, *latent], or a tuple of them for a plan with several outputs.

    Raises:
        PlanError: unbound names, another number of steps, times above T.
        SamplerError: nothing to train; sharded parameters with "recompute"; a DistributedDataParallel module with
            "split"; a velocity of another shape than its latent.
    """
    return _unwrap(run_outputs(field, memory, start_run(plan, trajectory, generator), params))


def values(
    plan: Plan | PerSample,
    trajectory: Trajectory,
    field: Fields,
    *,
    generator: Generators = None,
    params: Params = None,
) -> Outputs:
    """Return the plan's outputs without gradient, [batch, *latent] or a tuple. Only unfaithful calls run the model.

    It takes the arguments of `apply`; `params` is ignored.
    """
    return _unwrap(start_run(plan, trajectory, generator, gradient=False).finish(field, retained_call))


def distances(
    plan: Plan | PerSample,
    trajectory: Trajectory,
    field: Fields,
    *,
    generator: Generators = None,
    params: Params = None,
) -> dict[int, Tensor]:
    """Return {t: [batch]}: the mean |x_t - prediction| of the leaps and advances that land on t (LeapAlign, section
    4.5).

    A leap that is the sampler's own step has distance 0; if several others land on one t, their mean counts. With
    `PerSample`, samples whose plans do not land on t get NaN. It takes the arguments of `apply`; `params` is ignored.
    """
    execution = start_run(plan, trajectory, generator, gradient=False)
    execution.finish(field, retained_call)
    return execution.distances()


def backward(
    plan: Plan | PerSample,
    trajectory: Trajectory,
    field: Fields,
    cotangent: Tensor | Sequence[Tensor],
    *,
    generator: Generators = None,
    params: Params = None,
    check: bool = True,
) -> None:
    """The staged sweep: walk the plan in reverse, one model call and one backward pass at a time, adding into `.grad`.

    No second parameter gradient is ever held, and the field is called as it is, through the wrappers of DDP and FSDP.

    Args:
        cotangent: d(loss)/d(output), [batch, *latent], or one for each output.
        params: what receives a gradient; by default every leaf of the field's graph.
        check: whether to look for NaN and Inf in the cotangent, which waits for the device once.

    Raises:
        PlanError, SamplerError: as `apply`; a cotangent that does not match its output.
    """
    execution = start_run(plan, trajectory, generator)
    stages: list[tuple[ModelCall, Tensor, Tensor]] = []

    def stand_in(call: ModelCall, x: Tensor) -> Tensor:
        with torch.no_grad():
            v = call(x.detach()) if call.value is None else call.value
        leaf = v.detach().requires_grad_()  # shares its memory, and nothing writes into it
        stages.append((call, x, leaf))
        return leaf

    required = Noise not in map(type, execution.sources)
    trained = None if params is None else trainable_only(params, required)
    outputs = execution.finish(field, stand_in)
    _linear_gradients(outputs, match_cotangents(cotangent, outputs, check))
    # beside a field that trains another may be frozen; `ModelCall` checks those that are not
    some_are_frozen = isinstance(field, Mapping) and any(map(has_trainable_parameters, field.values()))
    for call, x, leaf in reversed(stages):
        if leaf.grad is not None:
            start = x.detach().requires_grad_(x.requires_grad)
            with torch.enable_grad():
                v = call(start)
            if v.requires_grad:
                backward_of_call(v, start, leaf.grad, trained)
            elif required and not some_are_frozen:
                raise SamplerError(
                    "the field's velocity requires no gradient: call requires_grad_() on what is to train."
                )
            del v  # what its graph holds is freed before the next call is made
            if start.grad is not None:
                _linear_gradients((x,), (start.grad,))


def _linear_gradients(roots: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """Propagate cotangents through the linear part of the plan to the leaves that replace the calls."""
    pairs = [(root, c) for root, c in zip(roots, cotangents, strict=True) if root.requires_grad]
    torch.autograd.backward([root for root, _ in pairs], [c for _, c in pairs], retain_graph=True)


def _new_trajectory(noise: Tensor, sigmas: Tensor | Sequence[float], interpolant: Interpolant | None) -> Trajectory:
    times = as_sigmas(sigmas, noise)
    return Trajectory(times, {len(times) - 1: noise.detach()}, {}, interpolant or RectifiedFlow(), start=noise)


def _run_sampler(
    fields: Fields,
    trajectory: Trajectory,
    check: bool,
    execution: Execution | None = None,
    split: bool = False,
    params: tuple[Tensor, ...] | None = None,
) -> None:
    """The sampler's loop. The model's input is the plan's own node where the plan calls at t, else the plain latent."""
    field, versions, x = field_named(fields, None), dict[int, int](), trajectory[trajectory.steps]
    for t in range(trajectory.steps, 0, -1):
        if execution is not None:
            execution.settle()
        if execution is None or (node := execution.wanted(t)) is None:
            with torch.no_grad():
                v = call_field(field, x, trajectory.sigma(t), t)
        else:
            node_x = execution.tensors[node.x]
            start = velocity_calls.cut(node_x) if split else node_x
            with torch.enable_grad():
                v = call_field(field, start, trajectory.sigma(t), t)
            execution.adopt(node, velocity_calls.split_call(node_x, v, start, params) if split else v)
        versions[t] = change_count(v)
        trajectory.velocities[t] = v.detach()
        x = x + (trajectory.sigma(t - 1) - trajectory.sigma(t)) * v.detach()
        trajectory.latents[t - 1] = x
    changed = [t for t, v in trajectory.velocities.items() if change_count(v) != versions[t]]
    if changed:
        raise SamplerError(
            f"the velocities of t = {changed} were changed in place after the field had returned them: it writes into "
            "one buffer again and again. Return a new tensor each time (v.clone())."
        )
    if check:
        check_finite(trajectory.latents, trajectory.velocities)


def _unwrap(outputs: tuple[Any, ...]) -> Any:
    return outputs[0] if len(outputs) == 1 else outputs
