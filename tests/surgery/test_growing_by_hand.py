"""Execution during the rollout: values settled, calls wanted, velocities adopted and forgotten, and the finish."""

from __future__ import annotations

from typing import Any

import torch

from tests.builders.linear_field import X0, Counted, W, first, rolled
from trajsurgery import Plan, Trajectory, latent, leapalign, noise
from trajsurgery.surgery.execution import Execution, first_call
from trajsurgery.surgery.velocity_calls import retained_call


def executed(plan: Plan, t: int) -> Execution:
    """The execution of a plan when the rollout has reached x_t and the model has not been called on it."""
    whole = rolled()
    trajectory = Trajectory(
        whole.sigmas,
        {s: x for s, x in whole.latents.items() if s >= t},
        {s: v for s, v in whole.velocities.items() if s > t},
    )
    execution = Execution(plan, trajectory)
    execution.settle()
    return execution


def test_calls_are_wanted_once_their_input_is_settled() -> None:
    plan = leapalign(3, 1)
    execution = executed(plan, 3)
    start = execution.wanted(3)
    assert start is not None
    assert start.x is latent(3)
    assert execution.wanted(2) is None
    assert execution.wanted(1) is None
    execution = executed(plan, 2)
    assert execution.wanted(2) is None
    assert execution.wanted(3) is start
    assert set(execution.tensors) == {latent(3)}
    v = execution.trajectory[3] * 0.5
    execution.adopt(start, v)
    assert execution.wanted(3) is None
    assert execution.tensors[start] is v
    execution.trajectory.latents[1] = torch.full((1, 2), 7.0, dtype=torch.float64)
    execution.settle()
    later = execution.wanted(1)
    assert later is not None
    assert first(execution.tensors[later.x]) == 7
    execution.forget(1)
    assert execution.wanted(1) is None
    assert latent(3) in execution.tensors
    execution.trajectory.latents[1] = torch.full((1, 2), 9.0, dtype=torch.float64)
    execution.settle()
    assert execution.wanted(1) is later
    assert first(execution.tensors[later.x]) == 9


def test_forgotten_values_are_no_longer_faithful() -> None:
    plan = Plan(latent(3).leap(2).leap(0))
    execution = executed(plan, 3)
    call: Any = execution.wanted(3)
    execution.trajectory.velocities[3] = execution.trajectory[3] * W
    execution.adopt(call, execution.trajectory.velocities[3])
    execution.trajectory.latents[2] = rolled()[2]
    execution.settle()
    assert {node.op for node in execution.faithful} == {"latent", "velocity", "leap"}
    execution.forget(2)
    assert {node.op for node in execution.faithful} == {"latent", "velocity"}


def test_a_call_that_trains_nothing_is_read_from_the_rollout() -> None:
    """A stopped velocity at x_2 is recorded at once; no model call is left for the finish."""
    plan = Plan(latent(2).leap(1, velocity=latent(2).velocity().detach()).leap(0))
    execution = executed(plan, 1)
    assert latent(2).velocity() in execution.tensors
    assert execution.wanted(2) is None
    field = Counted()
    execution.trajectory.velocities[1] = rolled().velocity(1)
    execution.trajectory.latents[0] = rolled()[0]
    (out,) = execution.finish(field, retained_call)
    assert field.times == [0.5]
    assert first(out) == X0


def test_renoised_samples_wait_for_the_image() -> None:
    plan = Plan(latent(2).leap(0), latent(0).renoise(2, "rollout").leap(0))
    assert {node.op for node in executed(plan, 1).tensors} == {"latent"}
    done = {node.op for node in executed(plan, 0).tensors}
    assert done == {"latent", "renoise"}


def test_the_first_call_of_a_plan() -> None:
    for plan, expected in (
        (leapalign(3, 1), latent(3).velocity()),
        (leapalign(2, 1), None),
        (Plan(latent(3).detach().leap(0)), latent(3).detach().velocity()),
        (Plan(noise().leap(0)), None),
        (Plan(latent(3).leap(0, velocity=latent(3).velocity("other"))), None),
        (Plan(latent(3).leap(1, velocity=latent(3).velocity().detach()).leap(0)), None),
        (Plan(latent(0).renoise(3).leap(0)), None),
    ):
        assert first_call(plan.prepared(3), 3) is expected, str(plan)
