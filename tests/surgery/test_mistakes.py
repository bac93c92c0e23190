"""Common mistakes are refused, with a repair, before the model is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.builders.small_pipelines import flux
from trajsurgery import (
    DRaFTLV,
    DRTune,
    LeapAlign,
    PlanError,
    ReFL,
    SamplerError,
    SurgeryError,
    apply,
    backward,
    distances,
    leapalign,
    leaps,
    operate,
    rollout,
    sample,
    values,
)
from trajsurgery.testing import MLP

X = torch.zeros(2, 4, dtype=torch.float64)
SIGMAS = [1.0, 0.5, 0.0]
FIELD = MLP(4)
PLAN: Any = leapalign(2, 1)


def never(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the model was called")


@pytest.mark.parametrize("no_plan", [LeapAlign(), LeapAlign, leapalign, None, "leapalign"])
def test_a_method_in_place_of_a_plan_is_refused(no_plan: Any) -> None:
    trajectory = rollout(FIELD, X, SIGMAS)
    for run in (apply, values, distances, lambda *a: backward(*a, X)):
        with pytest.raises(PlanError, match="is no plan"):
            run(no_plan, trajectory, never)
    with pytest.raises(PlanError, match="is no plan"):
        sample(no_plan, never, X, SIGMAS, memory="recompute")
    if no_plan is not None:
        with pytest.raises(PlanError, match=r"draw one, LeapAlign\(\)\.draw"):
            operate(flux().pipe, no_plan)


def test_memory_is_checked_before_the_rollout() -> None:
    staged: Any = "staged"
    with pytest.raises(PlanError, match="staged sweep"):
        sample(PLAN, never, X, SIGMAS, memory=staged)
    with pytest.raises(PlanError, match="staged sweep"):
        operate(flux().pipe, PLAN, memory=staged)


@pytest.mark.parametrize("plan", [leapalign("k", "j"), leapalign(5, 1)])
@pytest.mark.parametrize("memory", ["retain", "recompute"])
def test_a_plan_is_checked_before_the_rollout(plan: Any, memory: Any) -> None:
    with pytest.raises(PlanError):
        sample(plan, never, X, SIGMAS, memory=memory)


def test_a_field_that_returns_a_tuple_is_refused() -> None:
    """As diffusers' models do with return_dict=False."""
    with pytest.raises(SamplerError, match="returned a tuple"):
        rollout(lambda x, s: (FIELD(x, s),), X, SIGMAS)  # pyright: ignore[reportArgumentType]


def test_named_parameters_are_refused_as_params() -> None:
    pairs: Any = FIELD.named_parameters()
    with pytest.raises(SamplerError, match="params= received tuples"):
        apply(PLAN, rollout(FIELD, X, SIGMAS), FIELD, "recompute", params=pairs)


@pytest.mark.parametrize("method", [ReFL(last=0), DRTune(last=0), DRaFTLV(-1), LeapAlign(leaps=0)])
def test_a_method_without_times_is_refused(method: Any) -> None:
    with pytest.raises(PlanError):
        method.draw(6)
    with pytest.raises(PlanError, match="no time"):
        leaps(())


def test_nested_operate_blocks_are_refused() -> None:
    pipe = flux().pipe
    kind, outer, inner = type(pipe), operate(pipe), operate(pipe)
    with outer, pytest.raises(SamplerError, match="open already"), inner:
        pass
    assert type(pipe) is kind


def test_a_block_without_a_plan_has_no_outputs() -> None:
    small = flux()
    with operate(small.pipe) as surgery:
        small()
    with pytest.raises(SurgeryError, match="this block has none"):
        _ = surgery.outputs


def test_inference_mode_records_and_refuses_a_plan() -> None:
    small = flux()
    plain = small().images
    with torch.inference_mode(), operate(small.pipe) as surgery:
        images = small().images
    assert torch.equal(images, plain)
    assert surgery.trajectory.steps == 6
    with torch.inference_mode(), operate(small.pipe, PLAN), pytest.raises(SamplerError, match="inference_mode"):
        small()


@pytest.mark.parametrize("times", [(5, 5), (2, 5), (5, 0)])
def test_times_that_do_not_fall_are_refused(times: Any) -> None:
    with pytest.raises(PlanError, match="falling"):
        leapalign(*times)
