"""DRTune (Wu et al., 2024, arXiv 2405.00760): every network input detached, a few velocities kept, an early stop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trajsurgery.errors import PlanError
from trajsurgery.methods.draws import Method, late_time, uniform
from trajsurgery.plans.plan import Plan, latent, recorded

if TYPE_CHECKING:
    import torch


def drtune(steps: int, stop: int, train: Collection[int]) -> Plan:
    """x_T -> ... -> x_stop -> x^_0|stop with gradients at the velocities of `train` only: LeapAlign's Algorithm 1.

    Gradient, with s_t the length of the step that starts at t (from stop: the leap to 0):

        - sum over t in train, t >= stop, of s_t dv(x_t)/dtheta

    No deviation from Algorithm 1.

    Args:
        steps: T.
        stop: the early-stop time, T >= stop >= 1.
        train: the training times; those below `stop` are never reached.

    Raises:
        PlanError: no training time is left at or above the stop.
    """
    x = latent(steps)
    for t in range(steps, stop - 1, -1):
        v = x.detach().velocity() if t in train else recorded(t)
        x = x.leap(t - 1 if t > stop else 0, velocity=v)
    return Plan(x, steps=steps)


@dataclass(frozen=True)
class DRTune(Method):
    """Draws DRTune's times: `train` equally spaced ones, and an early stop among the last `last` steps.

    A draw with no training time at or above the stop would train nothing, and is drawn again.

    Args:
        train: K, the number of training times (2 in appendix E).
        last: the early-stop range m (11 of 25 in appendix E).
        connected: whether the reward looks at the rollout's image, with the gradient of the prediction: a deviation
            from Algorithm 1, by which several plans can share a rollout.
    """

    train: int = 2
    last: int = 11
    connected: bool = False

    def _draw(self, steps: int, generator: torch.Generator | None) -> Plan:
        if not 1 <= self.train <= steps:
            raise PlanError(
                f"DRTune(train={self.train}) on {steps} steps: the number of training times lies in 1..{steps}."
            )
        apart = steps // self.train
        while True:
            stop = late_time(self.last, steps, generator)
            first = 1 + uniform(steps - (self.train - 1) * apart, generator)
            times = {first + i * apart for i in range(self.train)}
            if max(times) >= stop:
                plan = drtune(steps, stop, times)
                return Plan(plan.outputs[0].connect()) if self.connected else plan
