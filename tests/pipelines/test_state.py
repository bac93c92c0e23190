"""`operate` restores the pipe whatever happens in the block, and refuses what it can't follow."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from tests.builders.small_pipelines import PIPELINES, Small
from trajsurgery import (
    PlanError,
    SamplerError,
    SurgeryError,
    drtune,
    leapalign,
    operate,
)

STEPS = 6


@pytest.fixture(params=PIPELINES)
def small(request: pytest.FixtureRequest) -> Small:
    torch.set_num_threads(1)
    return PIPELINES[request.param](torch.float64)


def state(pipe: Any) -> Any:
    scheduler = pipe.scheduler
    return (
        type(pipe),
        set(pipe.__dict__),
        set(scheduler.__dict__),
        scheduler.step.__func__,
        scheduler.set_timesteps.__func__,
    )


def test_the_pipe_is_left_as_it_was(small: Small) -> None:
    plain = small().images
    before = state(small.pipe)
    with operate(small.pipe, leapalign(5, 2)):
        small()
        assert type(small.pipe) is not before[0]
        assert isinstance(small.pipe, before[0])
    assert state(small.pipe) == before
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    with operate(small.pipe, leapalign(5, 2)), torch.no_grad():
        small()
        assert not torch.is_grad_enabled()
    assert torch.equal(small().images, plain)


def test_the_pipe_is_left_as_it_was_after_an_exception(small: Small) -> None:
    small()
    before = state(small.pipe)

    def fail(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt), operate(small.pipe, leapalign(5, 2)):
        small(callback_on_step_end=fail)
    assert state(small.pipe) == before
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks for m in (small.pipe.transformer, small.pipe.vae))
    with contextlib.suppress(ZeroDivisionError), operate(small.pipe, leapalign(5, 2)):
        small()
        raise ZeroDivisionError
    assert state(small.pipe) == before


@pytest.mark.parametrize("memory", ["retain", "recompute"])
def test_a_closed_block_is_freed_with_its_surgery(small: Small, memory: Any) -> None:
    """The pipe's class for the block kept the tensors alive until the garbage collector ran."""
    gc.collect()
    gc.disable()
    try:
        with operate(small.pipe, leapalign(5, 2), memory) as surgery:
            small()
        output = weakref.ref(surgery.outputs[0])
        del surgery
        assert output() is None
    finally:
        gc.enable()


def test_numpy_images_are_returned_too(small: Small) -> None:
    plain = small(output_type="np").images
    with operate(small.pipe, leapalign(5, 2)) as surgery:
        images = small(output_type="np").images
    assert (images == plain).all()
    assert surgery.outputs[0].requires_grad


def test_nested_blocks_are_refused(small: Small) -> None:
    with operate(small.pipe), pytest.raises(SamplerError, match="open already"), operate(small.pipe):
        pass


def test_another_number_of_steps_is_refused(small: Small) -> None:
    for plan, message in ((drtune(5, 2, {5}), "a plan for 5 steps"), (leapalign(7, 2), "time 7")):
        with operate(small.pipe, plan), pytest.raises(PlanError, match=message):
            small()


def test_unbound_names_are_refused_before_any_work(small: Small) -> None:
    with pytest.raises(PlanError, match="unbound"), operate(small.pipe, leapalign("k", 2)):
        pass


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_diffusion_scheduler_is_refused_before_any_work(small: Small, scheduler: Any) -> None:
    small.pipe.scheduler = scheduler()
    with pytest.raises(SamplerError, match="no flow-matching scheduler"), operate(small.pipe):
        pass


def test_what_is_not_a_pipeline_is_refused() -> None:
    with pytest.raises(SamplerError, match="takes a diffusers pipeline"), operate(torch.nn.Linear(2, 2)):
        pass


def test_results_before_the_call_are_refused(small: Small) -> None:
    with operate(small.pipe) as surgery, pytest.raises(SurgeryError, match="once the pipe has been called"):
        _ = surgery.trajectory


def test_the_field_refuses_times_that_are_not_the_sampler_s(small: Small) -> None:
    with operate(small.pipe) as surgery:
        small()
    with pytest.raises(SamplerError, match="no time of its sampler"):
        surgery.field(surgery.trajectory[2], torch.tensor(0.123))
