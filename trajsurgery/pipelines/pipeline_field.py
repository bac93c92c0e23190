"""A recorded pipeline as a velocity field: its own `__call__`, replayed for one timestep (replay.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trajsurgery.errors import SamplerError
from trajsurgery.pipelines.call_record import CallRecord
from trajsurgery.pipelines.replay import Replay
from trajsurgery.surgery.deferred_checks import are_deferred, require
from trajsurgery.surgery.trajectory import Trajectory, numbers

_ONE_PLAN = "Take one plan for the batch (--rollout.times shared)."


class PipelineField:
    """The velocity field of a recorded call: `field(x, sigma) -> v`, after guidance.

    It works inside the block and after it. x is [batch, *latent] as the loop holds it, sigma a time of the rollout, or
    [batch] of them (`timestep_inputs.TimestepInputs`).
    """

    def __init__(self, record: CallRecord, trajectory: Trajectory) -> None:
        self.record, self._trajectory = record, trajectory
        self._versions = self._changes()
        self._checked: set[tuple[int, bool]] = set()
        """Times at which a velocity was compared with the rollout's, and whether its samples had times of their own."""
        self._places = {i * trajectory.sigmas.element_size(): i for i in range(record.schedule.steps)}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the modules that the loop calls."""
        for module in self.record.templates:
            yield from module.parameters()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Make one model call (two or more with classifier-free guidance).

        Raises:
            SamplerError: sigma is not a time of the rollout; the pipeline's loop can't be replayed there.
        """
        self.record.stateless()
        schedule = self.record.schedule
        several = sigma.dim() == 1 and len(sigma) == len(x)
        steps = [*map(self._step_of, numbers(sigma))] if several else [self._step_at(sigma)] * len(x)
        apart = len(set(steps)) > 1
        velocity = self._entered([schedule.starts[step] for step in steps], x)
        times = [schedule.steps - step for step in steps]
        if not self._checked.issuperset((t, apart) for t in times) and self._unchanged():
            self._check(times, x.detach(), velocity.detach())
        return velocity

    def _step_at(self, sigma: Tensor) -> int:
        """Return the step that begins at sigma. The trajectory's own times are recognised by position, without the
        device.
        """
        sigmas = self._trajectory.sigmas
        if sigma.dim() == 0 and sigma.dtype == sigmas.dtype and sigma.data_ptr() - sigmas.data_ptr() in self._places:
            return self._places[sigma.data_ptr() - sigmas.data_ptr()]
        return self._step_of(sigma.tolist())

    def _step_of(self, sigma: Any) -> int:
        times = self.record.schedule.times[:-1]
        if sigma not in times:
            raise SamplerError(
                f"the pipeline's field was called at sigma = {sigma}, no time of its sampler: {list(times)}."
            )
        return times.index(sigma)

    def _entered(self, calls: list[int], x: Tensor) -> Tensor:
        """Make one model call, for the batch or for samples at different steps, each at its call of the scheduler."""
        call, gradient = max(calls), torch.is_grad_enabled()
        if call == 0 and not self.record.doubled:
            velocity = Replay(self.record, 0, 0, x, gradient).velocity()
            if velocity is not None:
                return velocity
            self.record.doubled = True  # the latents that it prepares are not what its loop begins with
        own = calls if len(set(calls)) > 1 else None
        if self.record.changes.differ(min(calls), max(calls)):
            raise SamplerError(
                f"a callback of {self.record.base.__name__} changed more than the latents (guidance, prompts) between "
                f"the times asked for, and one model call has one setting of them. {_ONE_PLAN}"
            )
        velocity = Replay(self.record, call, max(call, 1), x, gradient, own).velocity()
        assert velocity is not None
        return velocity

    @torch.no_grad()
    def check_replay(self, t: int) -> None:
        """Raise SamplerError if the pipeline, entered again at t, gives another velocity than in its rollout.

        The first call at each time checks this by itself, but not where FSDP holds the weights. They must be the
        rollout's. Waits for the device.
        """
        x = self._trajectory[t]
        self._check([t] * len(x), x, self(x, self._trajectory.sigma(t)))

    def _check(self, times: list[int], x: Tensor, v: Tensor) -> None:
        """Raise SamplerError if the same weights give a sample at the rollout's x_t another velocity than there.

        Waits for the device, once for each time of a rollout; inside `deferred_checks` it does not.
        """
        samples = [(self._trajectory.sample(i), t) for i, t in enumerate(times)]
        real = torch.cat([sample[t] for sample, t in samples])
        wide = torch.promote_types(v.dtype, torch.float32)
        expected = torch.cat([sample.velocity(t) for sample, t in samples]).to(wide)
        miss = (v.to(wide) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-30)
        misses = torch.where((x == real).flatten(1).all(1), miss, torch.nan)
        limit = 0.01 if v.dtype in (torch.float32, torch.float64) else 0.1
        if are_deferred():
            require(~(misses > limit).any(), lambda: self._other_velocity(times, misses.tolist()))
            return
        missed: list[float] = misses.tolist()
        if any(miss > limit for miss in missed):
            raise self._other_velocity(times, missed)
        apart = len(set(times)) > 1
        self._checked.update((t, apart) for t, miss in zip(times, missed, strict=True) if miss == miss)

    def _other_velocity(self, times: list[int], misses: list[float]) -> SamplerError:
        """Return the error for a velocity that a replay does not give again."""
        name, worst = self.record.base.__name__, max(missed for missed in misses if missed == missed)
        difference = f"in its rollout (relative difference {worst:.1g})"
        if len(set(times)) > 1:
            return SamplerError(
                f"{name}, entered with times of their own for its samples, t = {times}, gives other velocities than "
                f"{difference}: more depends on the time there than the vectors that its model receives. {_ONE_PLAN}"
            )
        return SamplerError(
            f"{name}, entered again at t = {times[0]}, gives another velocity than {difference}: its loop or a "
            "callback carries more from step to step than can be replayed. Use memory='retain' with a plan that fits "
            "one pass."
        )

    def _unchanged(self) -> bool:
        """Whether the weights are known to be those of the rollout."""
        return self._versions is not None and self._changes() == self._versions

    def _changes(self) -> int | None:
        """Return how often the weights have been changed in place; None if FSDP holds them, which does not count."""
        modules = self.record.modules()
        if any(isinstance(module, FSDPModule) for module in modules):
            return None
        return sum(p._version for module in modules for p in module.parameters())

    def decode(self, x: Tensor) -> Any:
        """Decode latents [batch, *latent] through the pipeline's own tail, with gradient."""
        return Replay(self.record, -1, self.record.schedule.calls, x, True).decoded()
