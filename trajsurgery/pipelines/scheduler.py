"""diffusers schedulers: which are flow matching, the times of their steps, and rerouting of an object's methods."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trajsurgery.errors import SamplerError
from trajsurgery.plans.interpolants import InvertedFlow, RectifiedFlow
from trajsurgery.surgery.deferred_checks import are_deferred
from trajsurgery.surgery.trajectory import assume_numbers, check_sigmas, numbers, pick

_MISSING = object()


def check_flow_matching(pipe: Any) -> None:
    """Raise SamplerError before any work if the pipeline's scheduler can't be a flow-matching one."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(pipe, "components"):
        raise SamplerError(
            f"operate() received a {type(pipe).__name__}: it takes a diffusers pipeline, with a scheduler."
        )
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type", "flow_prediction")
    sigmas = getattr(scheduler, "sigmas", None)
    above = isinstance(sigmas, Tensor) and not config.get("use_flow_sigmas") and max(numbers(sigmas)) > 1 + 1e-3
    if sigmas is None or above or kind != "flow_prediction":
        raise SamplerError(
            f"{type(scheduler).__name__} is no flow-matching scheduler: a leap needs a velocity dx/dsigma and sigmas "
            "in [0, 1]. Use FlowMatchEulerDiscreteScheduler, or UniPC or DPM-Solver++ with use_flow_sigmas=True and "
            "prediction_type='flow_prediction'."
        )


@dataclass(frozen=True)
class Schedule:
    """The T steps that a loop runs, each made of one call of `scheduler.step`, or of more as with Heun."""

    sigmas: Tensor
    """[T + 1] times, noise first."""
    times: tuple[float, ...]
    """The same as numbers, so that no device is read."""
    starts: tuple[int, ...]
    """For each step, the number (from 0) of the call that begins it."""
    calls: int
    """The number of calls in all."""
    whole: int
    """T of the whole schedule, of which the loop may run the tail."""

    @classmethod
    def of(cls, scheduler: Any, first: int) -> Schedule:
        """Return the schedule from entry `first` of the scheduler's timetable on.

        A call between two equal sigmas corrects the sample of the call before: the two are one step.

        Raises:
            SamplerError: the timetable is not that of a flow-matching sampler.
        """
        sigmas, calls = scheduler.sigmas, len(scheduler.timesteps)
        if len(sigmas) != calls + 1:
            raise SamplerError(
                f"{type(scheduler).__name__} has {len(sigmas)} sigmas for {calls} timesteps; operate() follows "
                "schedulers that have one more. Use FlowMatchEulerDiscreteScheduler."
            )
        times = numbers(sigmas)
        begins = [i for i in range(calls) if times[i] != times[i + 1]]
        left = [i for i in begins if i >= first]
        if not left:
            raise SamplerError(f"the loop begins at step {first} of a schedule whose {calls} steps are over by then.")
        sigmas_left = pick(sigmas, (*left, calls))
        check_sigmas(sigmas_left)
        starts = tuple(i - first for i in left)
        return cls(sigmas_left, (*(times[i] for i in left), times[-1]), starts, calls - first, len(begins))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.starts)

    def lands(self, call: int) -> bool:
        """Whether the call is its step's last."""
        return call + 1 in self.starts or call + 1 >= self.calls

    def interpolant(self) -> RectifiedFlow:
        """Rectified flow; for rising sigmas, the one whose sigma is the image's share."""
        return InvertedFlow() if self.times[0] < self.times[-1] else RectifiedFlow()


def first_timetable_entry(scheduler: Any) -> int:
    """Return the timetable entry at which the loop begins: after its first step, or as announced before it."""
    index, begin = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
    return index - 1 if isinstance(index, int) and index > 0 else begin or 0


def step_output(sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
    """Return the next latents as `scheduler.step` with these options does."""
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


_SIGMAS: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()
"""Of a scheduler: the sigmas that it made from some arguments."""


def remember_sigmas(scheduler: Any, arguments: Any) -> None:
    """Take the numbers of the scheduler's new sigmas for those that it made from the same arguments before.

    Only inside `deferred_checks`, which checks that they are equal; elsewhere they are read off the device when needed.
    """
    sigmas, leaves = getattr(scheduler, "sigmas", None), tree_leaves(arguments)
    if not are_deferred() or not isinstance(sigmas, Tensor) or any(isinstance(leaf, Tensor) for leaf in leaves):
        return
    values = repr([leaf.tolist() if hasattr(leaf, "tolist") else leaf for leaf in leaves])
    earlier = _SIGMAS.setdefault(scheduler, {}).setdefault(values, sigmas)
    if earlier is not sigmas and (earlier.shape, earlier.device) == (sigmas.shape, sigmas.device):
        assume_numbers(sigmas, earlier)


def is_euler_step(step: Any, scheduler: Any, options: dict[str, Any]) -> bool:
    """Whether a scheduler's step is known to be x + dsigma v (`Trajectory.is_step` measures others).

    Args:
        step: its own method.
        options: keyword arguments of the call.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler as Euler

    own = getattr(step, "__func__", None) is Euler.step and not options.keys() - {"return_dict", "generator"}
    return own and not scheduler.config.get("stochastic_sampling")


@contextlib.contextmanager
def shadow_attribute(thing: Any, name: str, value: Any) -> Generator[None]:
    """Shadow an attribute of the class by one of the object."""
    before = thing.__dict__.get(name, _MISSING)
    thing.__dict__[name] = value
    try:
        yield
    finally:
        thing.__dict__.pop(name, None)
        if before is not _MISSING:
            thing.__dict__[name] = before


def calling_first(action: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function: call `action` with the same arguments first."""

    def call(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def reroute(scheduler: Any, **around: Callable[..., Any]) -> Generator[None]:
    """Call methods of this one scheduler as `around(method, ...)`; its class stays, since pipelines check it."""
    with contextlib.ExitStack() as stack:
        for name, call in around.items():
            method = getattr(scheduler, name)
            method = method.function if isinstance(method, _Rerouted) else method
            stack.enter_context(shadow_attribute(scheduler, name, _Rerouted(scheduler, method, call)))
        yield


class _Rerouted:
    """A rerouted method. Copies of the scheduler (for a second stream such as sound) keep the original method."""

    def __init__(self, scheduler: Any, function: Callable[..., Any], around: Callable[..., Any]) -> None:
        self.scheduler, self.function, self.around = scheduler, function, around
        self.count = 0
        self.__name__ = function.__name__
        self.__signature__ = inspect.signature(function)  # which diffusers inspects

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.around(self.function, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        function = getattr(type(self.scheduler), self.__name__).__get__(memo[id(self.scheduler)])

        count = 0

        @functools.wraps(function)
        def constant(*args: Any, **kwargs: Any) -> Any:
            """The other stream is a constant to the plan."""
            nonlocal count
            count += 1
            if self.__name__ == "step" and count > 1 and self.count == 0:
                raise SamplerError(
                    "the loop steps copies of the scheduler (one for each frame, or each sample) and not the pipe's "
                    "own: each may be at another time, which operate() can't follow. Take a pipeline that steps all at "
                    "once."
                )
            with torch.no_grad():
                return function(*args, **kwargs)

        return constant
