"""`check_gradient`: one call that proves a plan or a method."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import PlanError
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.parameters import Fields
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.testing import ways_of_running
from trajsurgery.testing.diagnosis import Measure, explain
from trajsurgery.testing.frozen_reference import FrozenPlan
from trajsurgery.testing.proof_cases import Case, Drawable, cases, distance, norm

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""For gradients, relative to their norm, by the dtype of the latents."""


@dataclass(frozen=True)
class Proof:
    """What was proved."""

    plans: tuple[Plan, ...]
    gradients: tuple[tuple[Tensor, ...], ...]
    """The closed form's gradient of each plan on each field, one tensor for each parameter (and x_T)."""
    misses: dict[str, float]
    """The largest relative error of each check; 0 for what is compared bit for bit."""

    def __str__(self) -> str:
        head = f"proved, on {len(self.gradients)} runs of {len(self.plans)} plans:"
        return "\n".join([head, *(f"  {name:<12} misses by {miss:.0e}" for name, miss in self.misses.items())])


def check_gradient(
    plan: Drawable,
    field: Fields | Trajectory | None = None,
    trajectory: Trajectory | Fields | None = None,
    cotangents: Sequence[Tensor] | None = None,
    tolerance: float | None = None,
    *,
    steps: int | None = None,
    draws: int = 5,
    shape: Sequence[int] = (6, 4),
    skip: Collection[str] = (),
) -> Proof:
    """Prove a plan or a method: assert that in every way of running, its gradient is that of its closed form.

    - values: outputs connected at 0 are the rollout's x_0 bit for bit, calls on recorded latents receive exactly these,
      in float64, float32, bfloat16 and float16; in float64 every output is what the primitives define;
    - retain, recompute, staged, split, checkpointed: autograd's gradient is the closed form's, term by term from vjps;
    - jvp: <J t, c> = <t, J^T c> in forward mode (for fields that are Modules);
    - differences: finite differences of the frozen reference (`trajsurgery.testing.frozen_reference`) agree.

    Args:
        plan: a plan, with names or without; a method, an object with `draw(steps, generator)`; or a function of times
            that accepts names, as `leapalign` does.
        field: as in `trajsurgery.apply`; by default an MLP and the exact field of Gaussian images, in float64, each
            with a random trajectory. `check_gradient(plan, trajectory, field)` works as well.
        trajectory: a rollout of the field; by default a random one.
        cotangents: one for each output; by default random.
        tolerance: relative to the norm of the whole gradient; by default 1e-10 in float64.
        steps: of the random trajectories.
        draws: how often names are bound at random, and methods and random trajectories drawn.
        shape: of their latents, [batch, *latent].
        skip: names of checks to leave out.

    Raises:
        AssertionError: a check failed. For a gradient it says which term is wrong, at which times, by which factor.
        PlanError: the plan or method can't be drawn; fewer draws than 1, which would prove nothing.
    """
    if draws < 1:
        raise PlanError(f"check_gradient received draws={draws}: at least one plan is proved.")
    if isinstance(field, Trajectory) or (trajectory is not None and not isinstance(trajectory, Trajectory)):
        field, trajectory = trajectory, field
    plans: dict[Plan, None] = {}
    gradients: list[tuple[Tensor, ...]] = []
    misses: dict[str, float] = {}
    for case in cases(plan, field, trajectory, steps, draws, shape):  # pyright: ignore[reportArgumentType]  # swapped
        gradient, missed = _prove_case(case, cotangents, tolerance, skip)
        plans[case.plan] = None
        gradients += [gradient] if gradient else []
        misses |= {name: max(miss, misses.get(name, 0)) for name, miss in missed.items()}
    return Proof(tuple(plans), tuple(gradients), misses)


def _prove_case(
    case: Case, cotangents: Sequence[Tensor] | None, tolerance: float | None, skip: Collection[str]
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    tolerance = TOLERANCES[case.trajectory[0].dtype] if tolerance is None else tolerance
    cs = tuple(cotangents) if cotangents else case.cotangents(0)
    misses = {} if "values" in skip else {"values": ways_of_running.check_values(case, tolerance)}
    if case.values_only:
        return (), misses
    closed = closed_form(case, cs)
    for name, gradient in ways_of_running.GRADIENTS.items():
        if name not in skip:
            misses[name] = distance(gradient(case, cs), closed)
            _check_within_tolerance(case, name, misses[name], tolerance, _of_gradient(case, gradient))
    direction, frozen = case.direction(1), FrozenPlan(case)
    expected, scale = float(_rows([closed])[0] @ _rows([direction])[0]), max(norm(closed) * norm(direction), 1e-300)
    # of eighth-order differences, whose terms are as large as the outputs, however small a discount makes the gradient
    larger = min(max(100.0, norm(cs) * norm(frozen.outputs) / scale), 1e6)
    rounding = 10 * larger * float(torch.finfo(case.trajectory[0].dtype).eps ** (8 / 9))
    tangents: dict[str, tuple[Any, float]] = {
        "jvp": (ways_of_running.forward_mode(case), tolerance),
        "differences": (frozen.derivative, max(tolerance, rounding)),
    }
    for name, (tangent, allowed) in tangents.items():
        if name not in skip and tangent is not None:
            measure = _of_tangent(tangent)
            measured = float(measure([cs], [direction]))
            misses[name] = abs(measured - expected) / scale
            _check_within_tolerance(case, name, misses[name], allowed, measure)
    return closed, misses


def closed_form(case: Case, cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradient with respect to `case.wrt`, term by term."""
    expansion = case.plan.gradient(interpolant=case.trajectory.interpolant, limit=sys.maxsize)
    evaluation = expansion.evaluate(case.trajectory, case.fields, cotangents, case.params)
    gradient = tuple(evaluation)
    if len(case.wrt) == len(case.params):
        return gradient
    return (*gradient, torch.zeros_like(case.wrt[-1]) if evaluation.start is None else evaluation.start)


def _check_within_tolerance(case: Case, name: str, miss: float, tolerance: float, measure: Measure) -> None:
    """Raise AssertionError if the relative error is above the tolerance; the message names the terms."""
    if miss > tolerance or math.isnan(miss):
        values = "".join(f", {called} = {value:g}" for called, value in {**case.times, **case.factors}.items())
        raise AssertionError(
            f"{name} misses the closed form by {miss:.1e} (tolerance {tolerance:.0e}), in {case.plan}{values}:\n"
            f"{explain(case, measure)}"
        )


def _of_gradient(case: Case, gradient: Callable[[Case, tuple[Tensor, ...]], Sequence[Tensor]]) -> Measure:
    return lambda cotangents, directions: _rows(gradient(case, c) for c in cotangents) @ _rows(directions).T


def _of_tangent(tangent: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Measure:
    return lambda cotangents, directions: _rows(cotangents) @ _rows(tangent(d) for d in directions).T


def _rows(parts: Iterable[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([t.detach().double().flatten() for t in row]) for row in parts])
