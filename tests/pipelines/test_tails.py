"""Pipelines that run the tail of their schedule: T is the number of steps that the loop runs."""

from __future__ import annotations

import pytest

from tests.builders.pipelines.every import BUILDERS
from tests.builders.pipelines.parts import STEPS
from trajsurgery import PlanError, SamplerError, drtune, leapalign, operate

TAILS = {"Flux img2img": 2, "Flux inpaint": 3, "SD3 inpaint": 3, "Qwen-Image img2img": 2, "Wan video-to-video": 2}


@pytest.mark.parametrize("name", TAILS)
def test_t_is_the_number_of_steps_that_the_loop_runs(name: str) -> None:
    small, steps = BUILDERS[name](), TAILS[name]
    with operate(small.pipe) as surgery:
        small()
    assert surgery.trajectory.steps == steps
    whole = small.pipe.scheduler.sigmas
    assert surgery.trajectory.sigmas.tolist() == whole[STEPS - steps :].tolist()


@pytest.mark.parametrize("name", TAILS)
def test_a_plan_for_the_whole_schedule_is_refused(name: str) -> None:
    small, steps = BUILDERS[name](), TAILS[name]
    for plan in (drtune(STEPS, 1, {STEPS}), leapalign(STEPS, 1)):
        message = rf"runs the last {steps} of its schedule's {STEPS} steps.*write the plan for T = {steps}"
        with operate(small.pipe, plan), pytest.raises(PlanError, match=message):
            small()


def test_strengths_that_do_not_divide_the_schedule_are_replayed() -> None:
    """The longer schedule of a replay must not change which steps the pipeline runs."""
    small = BUILDERS["Flux img2img"]()
    for strength, steps, ran in ((0.7, 6, 5), (0.9, 5, 5), (0.3, 7, 3)):
        with operate(small.pipe) as surgery:
            small(strength=strength, num_inference_steps=steps)
        trajectory, field = surgery.trajectory, surgery.field
        assert trajectory.steps == ran
        for t in range(1, trajectory.steps + 1):
            assert bool((field(trajectory[t], trajectory.sigma(t)) == trajectory.velocity(t)).all()), (strength, t)


def test_a_replay_that_reaches_another_time_is_refused() -> None:
    """With a longer schedule Flux runs another tail of it: the velocity would be of another time."""
    small = BUILDERS["Flux img2img"]()
    with operate(small.pipe) as surgery:
        small(strength=0.7, num_inference_steps=6)
    trajectory, field = surgery.trajectory, surgery.field
    field.record.doubled = True  # as where the latents that a pipeline prepares are not those of its loop
    with pytest.raises(SamplerError, match="came to"):
        field(trajectory[trajectory.steps], trajectory.sigma(trajectory.steps))


@pytest.mark.parametrize("name", ["Flux img2img", "Wan video-to-video"])
def test_a_plan_from_the_first_step_costs_no_call(name: str) -> None:
    """Wan announces no first step; its progress bar has the number of steps."""
    small, count = BUILDERS[name](), [0]
    small.pipe.transformer.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    small()
    plain, count[0] = count[0], 0
    with operate(small.pipe, leapalign(TAILS[name], 1)):
        small()
    assert count[0] == plain
