"""The ways to run a plan: `rollout`, `apply`, `sample`, `values`, `backward`, `distances`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import SamplerError
from trajsurgery.plans.interpolants import Interpolant, RectifiedFlow
from trajsurgery.plans.nodes import Noise
from trajsurgery.plans.per_sample import PerSample
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.execution import Execution, fitting, planned
from trajsurgery.surgery.lockstep import run
from trajsurgery.surgery.parameters import Fields, Params, named, trainable, trains
from trajsurgery.surgery.trajectory import Trajectory, as_sigmas
from trajsurgery.surgery.validation import called, check_finite, matching, version
from trajsurgery.surgery.velocity_calls import Memory, Run, known, outputs, retained

Outputs = Tensor | tuple[Tensor, ...]


def rollout(
    field: Fields,
    noise: Tensor,
    sigmas: Tensor | Sequence[float],
    interpolant: Interpolant | None = None,
    *,
    check: bool = True,
) -> Trajectory:
    """The sampler's own run, x + dsigma v, without gradient: records every x_t and v_t.

    Args:
        field: field(x, sigma) -> v, x and v [batch, *latent], sigma 0-dim; or a mapping of fields, the default under
            None.
        noise: x_T, [batch, *latent]. If it requires a gradient, `noise()` in a plan gives it one.
        sigmas: [T + 1] strictly monotone times in [0, 1], from noise to image.
        interpolant: what leaps assume; rectified flow if left out. The rollout itself is Euler's whatever it is.
        check: whether NaN and Inf are looked for at the end, which waits for the device once.

    Raises:
        SamplerError: sigmas of a wrong shape, order or range; what is no velocity (`inputs.called`); NaN or Inf.
    """
    trajectory = _roll(field, noise, sigmas, interpolant, None)[1]
    if check:
        check_finite(trajectory.latents, trajectory.velocities)
    return trajectory


def sample(
    plan: Plan,
    field: Fields,
    noise: Tensor,
    sigmas: Tensor | Sequence[float],
    interpolant: Interpolant | None = None,
    *,
    memory: Memory = "retain",
    generator: torch.Generator | None = None,
    params: Params = None,
    check: bool = True,
) -> tuple[Outputs, Trajectory]:
    """Rollout and surgery in one pass: the plan's faithful calls are the rollout's own, so that they cost no extra one.

    Args:
        check: as in `rollout`: False in a training loop that looks at its loss anyway.

    Returns:
        The outputs as `apply` gives them, and the trajectory as `rollout` does.

    Raises:
        PlanError: the plan does not fit T = len(sigmas) - 1 steps, or has unbound names.
        SamplerError: as `rollout` and `apply`.
    """
    known(memory)
    planned(plan)
    fitting(plan, len(as_sigmas(sigmas, noise)) - 1)
    rolled = _roll(field, noise, sigmas, interpolant, plan if memory == "retain" else None, generator)
    trajectory = rolled[1]
    if check:
        check_finite(trajectory.latents, trajectory.velocities)
    execution: Run = rolled[0] or Execution(plan, trajectory, generator)
    return _single(outputs(field, memory, execution, params)), trajectory


def apply(
    plan: Plan | PerSample,
    trajectory: Trajectory,
    field: Fields,
    memory: Memory = "retain",
    *,
    generator: torch.Generator | None = None,
    params: Params = None,
) -> Outputs:
    """The plan's outputs on a recorded trajectory, with the plan's gradient.

    A trajectory belongs to the weights that made it. After an optimiser's step, velocities that are called anew are the
    new weights', recorded ones are still the old ones'. A renoised sample's noise is drawn once for a trajectory: plans
    that name the same (draw, to) share it.

    Args:
        plan: one for the batch, or `PerSample`: one for each of its samples.
        memory: "retain" keeps the activations of every velocity call; "recompute" keeps those of none and runs the
            model again in the backward pass, one call at a time (first-order reverse mode only; falls back to retain
            under a torch.func transform or forward-mode AD).
        generator: draws the noises of renoised samples that the trajectory does not hold yet (torch's default if left
            out).
        params: what trains; else `field.parameters()`, else the leaves found by walking the graph of one call.

    Returns:
        [batch, *latent], or a tuple of them for a plan with several outputs.

    Raises:
        PlanError: unbound names, another number of steps, times above T.
        SamplerError: no leaf to train; sharded parameters with "recompute"; a velocity that has not its latent's shape.
    """
    return _single(outputs(field, memory, run(plan, trajectory, generator), params))


def values(
    plan: Plan | PerSample,
    trajectory: Trajectory,
    field: Fields,
    *,
    generator: torch.Generator | None = None,
    params: Params = None,
) -> Outputs:
    """The plan's outputs without gradient, [batch, *latent] or a tuple. Only unfaithful calls run the model.

    It is called like `apply`; nothing trains here, so `params` is not read.
    """
    return _single(run(plan, trajectory, generator, gradient=False).finish(field, retained))


def distances(
    plan: Plan | PerSample,
    trajectory: Trajectory,
    field: Fields,
    *,
    generator: torch.Generator | None = None,
    params: Params = None,
) -> dict[int, Tensor]:
    """{t: [batch]}: the mean |x_t - prediction| of the leaps and advances that land on t (LeapAlign, section 4.5).

    A leap that is the sampler's own step misses by 0; where several others land on one t, their mean. Of `PerSample`,
    NaN for samples whose plans do not land on t. It is called like `apply`; nothing trains here, so `params` is not
    read.
    """
    execution = run(plan, trajectory, generator, gradient=False)
    execution.finish(field, retained)
    return execution.distances()


def backward(
    plan: Plan | PerSample,
    trajectory: Trajectory,
    field: Fields,
    cotangent: Tensor | Sequence[Tensor],
    *,
    generator: torch.Generator | None = None,
    params: Params = None,
    check: bool = True,
) -> None:
    """The staged sweep: walks the plan in reverse, one model call and one backward at a time, and adds into `.grad`.

    No second parameter gradient is ever held, and the calls go through the field as it is, hence through the wrappers
    of DDP and FSDP.

    Args:
        cotangent: d(loss)/d(output), [batch, *latent], or one for each output.
        params: what receives a gradient; every leaf of the field's graph if left out.
        check: whether NaN and Inf are looked for in the cotangent, which waits for the device once.

    Raises:
        PlanError, SamplerError: as `apply`; a cotangent that is none of its output (`inputs.matching`).
    """
    execution = run(plan, trajectory, generator)
    stages: list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = []

    def stand_in(call: Callable[[Tensor], Tensor], x: Tensor, known: Tensor | None, name: str | None) -> Tensor:
        with torch.no_grad():
            v = call(x.detach()) if known is None else known
        leaf = v.detach().clone().requires_grad_()
        stages.append((call, x, leaf))
        return leaf

    required = not any(isinstance(node, Noise) for node in execution.live)
    trained = None if params is None else trainable(params, required)
    # Beside a field that trains another may be frozen; `calls.training` looks after those that are not.
    every = required and not (isinstance(field, Mapping) and any(map(trains, field.values())))
    found = execution.finish(field, stand_in)
    _pull(found, matching(cotangent, found, check))
    for call, x, leaf in reversed(stages):
        if leaf.grad is not None:
            _stage(call, x, leaf.grad, trained, every)


def _stage(
    call: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor, trained: tuple[Tensor, ...] | None, required: bool
) -> None:
    """One model call and its backward; the gradient of its input goes on through the linear part of the plan."""
    x_leaf = x.detach().requires_grad_(x.requires_grad)
    with torch.enable_grad():
        v = call(x_leaf)
    if not v.requires_grad and required:
        raise SamplerError("the field's velocity requires no gradient: call requires_grad_() on what is to train.")
    if not v.requires_grad:
        return
    inputs = None if trained is None else [*trained, *([x_leaf] if x.requires_grad else [])]
    torch.autograd.backward(v, cotangent.to(v.dtype), inputs=inputs)
    if x_leaf.grad is not None:
        _pull((x,), (x_leaf.grad,))


def _pull(roots: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """Cotangents through the linear part of the plan, to the stand-ins of the calls; kept, since calls share it."""
    pairs = [(root, c) for root, c in zip(roots, cotangents, strict=True) if root.requires_grad]
    torch.autograd.backward([root for root, _ in pairs], [c for _, c in pairs], retain_graph=True)


def _roll(
    fields: Fields,
    noise: Tensor,
    sigmas: Tensor | Sequence[float],
    interpolant: Interpolant | None,
    plan: Plan | None,
    generator: torch.Generator | None = None,
) -> tuple[Execution | None, Trajectory]:
    """The loop: the model's input is the plan's own node where the plan calls at t, else the plain latent."""
    times = as_sigmas(sigmas, noise)
    x = noise.detach()
    trajectory = Trajectory(times, {len(times) - 1: x}, {}, interpolant or RectifiedFlow(), start=noise)
    execution = None if plan is None else Execution(plan, trajectory, generator)
    field, versions = named(fields, None), dict[int, int]()
    for t in range(trajectory.steps, 0, -1):
        node = None
        if execution is not None:
            execution.settle()
            node = execution.wanted(t)
        with torch.set_grad_enabled(node is not None):
            given = x if node is None or execution is None else execution.tensors[node.x]
            v = called(field, given, trajectory.sigma(t), t)
        versions[t] = version(v)
        if node is not None and execution is not None:
            execution.adopt(node, v)
        trajectory.velocities[t] = v.detach()
        x = x + (trajectory.sigma(t - 1) - trajectory.sigma(t)) * v.detach()
        trajectory.latents[t - 1] = x
    changed = [t for t, v in trajectory.velocities.items() if version(v) != versions[t]]
    if changed:
        raise SamplerError(
            f"the velocities of t = {changed} were changed in place after the field had returned them: it writes into "
            "one buffer again and again. Return a new tensor each time (v.clone())."
        )
    return execution, trajectory


def _single(found: tuple[Any, ...]) -> Any:
    return found[0] if len(found) == 1 else found
