"""Replay a pipeline's own `__call__` for one timestep.

The loop runs with the recorded arguments. Model calls before the wanted step are skipped and return their recorded
results, so that the loop's index, schedule and memory are as in the rollout. Then the latents are substituted inside
the loop, one model call is made, and what the loop passes to `scheduler.step` is the velocity. For the first step, the
latents are substituted where the pipeline prepares them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trajsurgery.errors import SamplerError
from trajsurgery.pipelines.call_record import CallRecord, encoder_methods, is_like, latents_methods, skipped_calls
from trajsurgery.pipelines.guidance import GuidancePasses
from trajsurgery.pipelines.scheduler import calling_first, reroute, shadow_attribute, step_output
from trajsurgery.surgery.deferred_checks import require


class _Stop(BaseException):
    """Leaves the pipeline's `__call__` with the velocity."""

    def __init__(self, velocity: Tensor | None) -> None:
        super().__init__()
        self.velocity = velocity


class Replay:
    """One replay: skip the model calls of the first `skipped` steps, then substitute the latents."""

    def __init__(
        self, record: CallRecord, call: int, skipped: int, x: Tensor, gradient: bool, calls: list[int] | None = None
    ) -> None:
        self.record, self.call, self.skipped, self.x, self.gradient = record, call, skipped, x, gradient
        self.calls = calls
        self.count = 0
        self.begun = False
        self.handed: Tensor | None = None
        """x, as the pipeline's loop was handed it in place of its first latents."""
        self.passes = GuidancePasses(())
        self.stack: contextlib.ExitStack
        self.skipping: contextlib.ExitStack

    def velocity(self) -> Tensor | None:
        """Return what the loop passes to `scheduler.step` at the call; None if the latents were not substituted."""
        try:
            # before the first call no callback was made; an iteration that comes before it has none either
            self._run(self.record.again(changes=self.call != 0))
        except _Stop as stop:
            return stop.velocity
        raise SamplerError(
            f"{self.record.base.__name__}'s loop, entered again, ended after {self.count} calls of scheduler.step, "
            f"before call {self.call}: its arguments (prompt embeddings, images) were changed after the recorded call."
        )

    def decoded(self) -> Any:
        """Return what the pipeline returns for the latents."""
        images = self._run(self.record.again(changes=True) | {"output_type": "pt", "return_dict": True})
        return next(iter(images.values())) if hasattr(images, "values") else images[0]

    def _run(self, arguments: dict[str, Any]) -> Any:
        pipe, base = self.record.pipe, self.record.base
        with contextlib.ExitStack() as self.stack:
            enter = self.stack.enter_context
            enter(_restore_attributes(pipe))
            self.record.changes.rewind(pipe)
            enter(_restore_attributes(pipe.scheduler))
            # of all devices, which is the default, torch warns where there are several
            devices = [self.x.device] if self.x.is_cuda else []
            enter(torch.random.fork_rng(devices))
            enter(torch.no_grad())
            torch.set_rng_state(self.record.random)
            for device in devices:
                torch.cuda.set_rng_state(self.record.random_cuda[device.index or 0], device)
            self.skipping = enter(contextlib.ExitStack())
            enter(reroute(pipe.scheduler, set_timesteps=self._set_timesteps, step=self._step))
            for owner, name in encoder_methods(pipe, base):
                memory = iter(self.record.encodings.get((id(owner), name), ()))
                if (id(owner), name) in self.record.encodings:
                    enter(shadow_attribute(owner, name, lambda *_, memory=memory, **__: next(memory)))
            if self.skipped == 0:
                for name in latents_methods(base):
                    pipe.__dict__[name] = self._substituting(getattr(base, name).__get__(pipe))
            pipe.__dict__["_progress_bar_config"] = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
            pipe.__dict__["progress_bar"] = calling_first(self._begin, base.progress_bar.__get__(pipe))
            return inspect.unwrap(base.__call__)(pipe, **arguments)

    def _substituting(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method that prepares latents: replace the loop's initial latents by x.

        Where the record does not tell them, they are found by their value, for which the host waits for the device.
        """
        start, own = self.record.start, self.record.own_latents

        def substituted(value: Any) -> Any:
            if not is_like(value, start) or not (own or torch.equal(value.to(start.dtype), start)):
                return value
            self.handed = self.x.to(value.dtype)
            return self.handed

        def call(*args: Any, **kwargs: Any) -> Any:
            return tree_map(substituted, prepare(*args, **kwargs))

        return call

    def _set_timesteps(self, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler = self.record.pipe.scheduler
        if self.call == 0 and self.skipped:  # one before the first, whose result is replaced
            scheduler.timesteps = torch.cat([scheduler.timesteps[:1], scheduler.timesteps])
        if not self.record.announced:
            self._begin()

    def _begin(self, *_: Any, **__: Any) -> None:
        """The loop begins: skip its model calls, or make them if the first is wanted."""
        if self.begun:
            return
        self.begun = True
        if self.skipped == 0:
            self._open()
        else:
            self.skipping.enter_context(skipped_calls(self.record.templates))

    def _open(self) -> None:
        """The next model call is the wanted one."""
        self.skipping.close()
        if self.calls is not None:
            self.stack.enter_context(self.record.clock.of_calls(self.calls))
        torch.set_grad_enabled(self.gradient)
        if self.gradient and self.call >= 0:
            self.passes = self.record.guidance_passes()
            self.stack.callback(self.passes.stop)

    def _step(self, step: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count > self.skipped:
            self._arrived(model_output, timestep, sample)
        if self.call != 0:  # masks are blended in at the noise level that the scheduler's own index says
            step(model_output, timestep, sample, *args, **kwargs)
        if self.count == self.skipped:
            self._open()
            sample = self.x
        return step_output(sample, **kwargs)

    def _arrived(self, v: Tensor, timestep: Any, sample: Tensor) -> None:
        """Leave with the velocity, if this is the wanted call."""
        if self.skipped == 0:
            lost = self.x.requires_grad and self.gradient and not sample.requires_grad
            other = sample is not self.handed and (
                sample.shape != self.x.shape or not torch.equal(sample, self.x.to(sample.dtype))
            )
            if lost or other:
                raise _Stop(None)
        recorded_timestep = self.record.timesteps[self.call]
        arrived = self.call, self.skipped
        if arrived not in self.record.arrived:
            require(
                (torch.as_tensor(timestep) == torch.as_tensor(recorded_timestep)).all(),
                lambda: SamplerError(
                    f"{self.record.base.__name__}'s loop, replayed for timestep {recorded_timestep}, came to "
                    f"{timestep}: its schedule depends on more than its arguments. Use memory='retain' with a plan "
                    "that fits one pass."
                ),
            )
        self.record.arrived.add(arrived)
        self.passes.tell(v)
        raise _Stop(v)


@contextlib.contextmanager
def _restore_attributes(thing: Any) -> Generator[None]:
    """Restore an object's attributes on exit."""
    before = dict(thing.__dict__)
    try:
        yield
    finally:
        thing.__dict__.clear()
        thing.__dict__.update(before)
