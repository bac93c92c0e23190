"""`operate` refuses loops that it can't follow, and the message names the reason."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import (
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from torch.utils._pytree import tree_flatten

from tests.builders.pipelines.every import BUILDERS
from tests.builders.pipelines.parts import Small
from trajsurgery import SamplerError, leapalign, operate
from trajsurgery.pipelines.call_record import CallRecord
from trajsurgery.plans.plan import Plan


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        EDMEulerScheduler,
        SCMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        CosineDPMSolverMultistepScheduler,
        lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True),
        lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
    ],
)
def test_a_scheduler_that_is_no_flow_matching_sampler_is_refused(scheduler: Any) -> None:
    try:
        instance = scheduler()
    except ImportError as error:
        pytest.skip(str(error))
    small = BUILDERS["SD3"]()
    small.pipe.scheduler = instance
    with pytest.raises(SamplerError, match="no flow-matching scheduler"), operate(small.pipe):
        pass


def test_sigmas_beyond_one_are_refused() -> None:
    """Cosmos runs an EDM schedule on the flow-matching Euler class."""
    small = BUILDERS["Flux"]()
    with pytest.raises(SamplerError, match="times lie in \\[0, 1\\]"), operate(small.pipe):
        small(sigmas=[math.e**2, 1.0, 0.5, 0.1])


class Sections(FluxPipeline):
    """Two loops in one call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class OwnSteps(FluxPipeline):
    """Sets a schedule and steps a copy of the scheduler."""

    def __call__(self, *, generator: Any, **_: Any) -> Any:
        self.scheduler.set_timesteps(4, mu=0.5)
        stepper = copy.deepcopy(self.scheduler)
        x = torch.randn(2, 16, 16, generator=generator)
        for t in self.scheduler.timesteps:
            x = stepper.step(-x, t, x, return_dict=False)[0]
        return (x,)


class Interrupted(FluxPipeline):
    """Stops after two steps."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, callback_on_step_end=self._stop, **kwargs)

    def _stop(self, pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        self._interrupt = step == 1 or self._interrupt
        return {}


@pytest.mark.parametrize(
    "kind, message",
    [
        (Sections, "runs a schedule again within one call"),
        (OwnSteps, "steps copies of the scheduler"),
        (Interrupted, "ended after 2 of its 4 steps"),
    ],
)
@pytest.mark.parametrize("plan", [None, leapalign(4, 1)])
def test_a_loop_that_cannot_be_followed_is_refused(kind: Any, message: str, plan: Any) -> None:
    flux = BUILDERS["Flux"]()
    parts = {n: c for n, c in flux.pipe.components.items() if n != "image_encoder" and "feature" not in n}
    small = Small(kind(**parts), flux.arguments)
    small.pipe.set_progress_bar_config(disable=True)
    with pytest.raises(SamplerError, match=message), operate(small.pipe, plan):
        small()
    assert torch.is_grad_enabled()


class WithSound(FluxPipeline):
    """A second stream, stepped by a copy of the scheduler and fed back into the loop."""

    announced = 4
    gain = 1.0

    def __call__(self, *, generator: Any, prompt_embeds: Any, pooled_prompt_embeds: Any, **_: Any) -> Any:
        self.scheduler.set_timesteps(4, mu=0.5)
        sound_scheduler = copy.deepcopy(self.scheduler)
        x = torch.randn(2, 16, 16, generator=generator, dtype=prompt_embeds.dtype)
        sound = torch.randn(2, 12, generator=generator, dtype=prompt_embeds.dtype)
        ids = torch.zeros(16, 3, dtype=x.dtype)
        with self.progress_bar(total=self.announced):
            for t in self.scheduler.timesteps:
                v = self.transformer(
                    hidden_states=x,
                    encoder_hidden_states=prompt_embeds + sound[:, None],
                    pooled_projections=pooled_prompt_embeds,
                    timestep=t.expand(2) / 1000,
                    guidance=torch.ones(2),
                    img_ids=ids,
                    txt_ids=ids[:5],
                    return_dict=False,
                )[0]
                if self.gain != 1:
                    v.mul_(self.gain)  # into what the transformer returned
                sound = sound_scheduler.step(v.mean((1, 2))[:, None].expand(2, 12), t, sound, return_dict=False)[0]
                x = self.scheduler.step(v, t, x, return_dict=False)[0]
        return (x,)

    __call__ = torch.no_grad()(__call__)


def with_sound() -> Small:
    flux = BUILDERS["Flux"]()
    parts = {n: c for n, c in flux.pipe.components.items() if n != "image_encoder" and "feature" not in n}
    return Small(WithSound(**parts), flux.arguments | {"output_type": "latent"})


@pytest.mark.parametrize("announced", [4, 2])
@pytest.mark.parametrize("plan", [leapalign(4, 3), leapalign(2, 1)])
def test_a_second_stream_carries_no_gradient(plan: Plan, announced: int) -> None:
    """Sound beside the images: its steps are unchanged, and no gradient passes through it.

    A progress bar of another length than the loop's is a wrong guess at T, which costs a call at most.
    """
    small = with_sound()
    small.pipe.announced = announced
    plain = small()[0]
    params = list(small.pipe.transformer.parameters())
    grads: list[Any] = []
    for memory in ("retain", "recompute"):
        with operate(small.pipe, plan, memory) as surgery:
            assert torch.equal(small()[0], plain)
        grads.append(torch.autograd.grad(surgery.outputs, params, [torch.ones_like(plain)], allow_unused=True))
    for retained, recomputed in zip(*grads, strict=True):
        if retained is not None:
            torch.testing.assert_close(recomputed, retained)


def test_a_loop_that_writes_into_a_model_s_output_is_replayed() -> None:
    """The recorded output held the loop's in-place change, and a replay applied the change again."""
    small = with_sound()
    small.pipe.gain = 1.5
    with operate(small.pipe) as surgery:
        small()
    trajectory, field = surgery.trajectory, surgery.field
    for t in range(1, trajectory.steps + 1):
        assert torch.equal(field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t)), f"at t = {t}"


def trim_everything(self: CallRecord, size: int) -> None:
    """Trim every output to its shape, as if it were too large to record."""
    FULL_TRIM(self, 0)


FULL_TRIM = CallRecord.trim


def test_outputs_too_large_to_record_are_replayed_as_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop whose only state is the latents is replayed all the same; any other is refused."""
    monkeypatch.setattr(CallRecord, "trim", trim_everything)
    for small, carries in ((BUILDERS["Flux"](), False), (BUILDERS["SD3"](), False), (with_sound(), True)):
        with operate(small.pipe) as surgery:
            small()
        assert all(not leaf.numel() or leaf.is_meta for leaf in recorded_tensors(surgery.field.record))
        trajectory = surgery.trajectory
        if carries:
            with pytest.raises(SamplerError, match="gives another velocity than in its rollout"):
                surgery.field(trajectory[2], trajectory.sigma(2))
        else:
            assert torch.equal(surgery.field(trajectory[2], trajectory.sigma(2)), trajectory.velocity(2))


def test_a_replay_is_compared_with_the_rollout_sample_by_sample() -> None:
    """A sample that leaves the rollout's x_t, and one whose velocity is right, hide no other sample's wrong one."""
    small = BUILDERS["Flux"]()
    with operate(small.pipe) as surgery:
        small()
    trajectory, field = surgery.trajectory, surgery.field
    x, wrong = trajectory[2].clone(), trajectory.velocity(2).clone()
    x[1] += 1
    wrong[0] *= 1.012
    trajectory.velocities[2] = wrong
    for latents in (x, trajectory[2]):
        with pytest.raises(SamplerError, match="gives another velocity than in its rollout"):
            field(latents, trajectory.sigma(2))


def recorded_tensors(record: CallRecord) -> list[torch.Tensor]:
    leaves = tree_flatten(list(record.templates.values()))[0]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def test_other_weights_give_other_velocities() -> None:
    """After an optimiser's step the recorded velocities are those of the old weights, which is no error."""
    small = BUILDERS["Flux"]()
    with operate(small.pipe) as surgery:
        small()
    with torch.no_grad():
        for p in small.pipe.transformer.parameters():
            p.mul_(1.5)
    v = surgery.field(surgery.trajectory[2], surgery.trajectory.sigma(2))
    assert not torch.allclose(v, surgery.trajectory.velocity(2))


def test_a_pipeline_may_compare_the_scheduler_s_type() -> None:
    """Bria compares the scheduler's type with Euler's: a subclass for the block made it take another branch."""
    small = BUILDERS["Bria"]()
    assert type(small.pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    with operate(small.pipe):
        small()
