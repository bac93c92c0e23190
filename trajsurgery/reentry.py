"""A pipeline's own `__call__`, entered again for one timestep: the velocity field that a pipeline is.

The loop runs with the recorded arguments. Until the wanted step its model calls are skipped (zeros of the right shape
stand in), so that the loop's own index and schedule are what they were; then the latents are substituted inside the
loop, one model call is made, and what it passes to `scheduler.step` is the velocity.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trajsurgery.errors import SamplerError

_MISSING = object()


@dataclass
class Record:
    """What one call of a pipeline was made with, and what it is not to do again."""

    pipe: Any
    base: type
    """The pipeline's own class."""
    arguments: dict[str, Any]
    generators: dict[int, Tensor]
    """{id of a generator among the arguments: its state when the call began}."""
    random: Tensor
    """The CPU's global generator's state when the call began."""
    random_cuda: list[Tensor]
    """Those of the GPUs."""
    encodings: list[Any] = field(default_factory=list[Any])
    """What `encode_prompt` returned, call by call."""
    templates: dict[nn.Module, list[Any]] = field(default_factory=dict[nn.Module, list[Any]])
    """The outputs of the modules that one step of the loop calls, on the meta device."""
    times: list[float] = field(default_factory=list[float])
    """The sampler's sigmas, noise first."""

    @classmethod
    def of(cls, pipe: Any, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
        """The record of a call that is about to be made."""
        bound = inspect.signature(inspect.unwrap(base.__call__)).bind(pipe, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments.pop(next(iter(arguments)))
        arguments.update(arguments.pop("kwargs", {}))
        states = {id(g): g.get_state() for g in _generators(arguments)}
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(pipe, base, arguments, states, torch.get_rng_state(), gpus)

    def watch(self) -> Callable[[], None]:
        """Notes the outputs of the modules that are called from now on, until the returned function is."""

        def note(module: nn.Module, _: Any, output: Any) -> None:
            self.templates.setdefault(module, []).append(tree_map(_shape, output))

        modules = [m for m in self.pipe.components.values() if isinstance(m, nn.Module)]
        handles = [module.register_forward_hook(note) for module in modules]

        def stop() -> None:
            for handle in handles:
                handle.remove()

        return stop

    def again(self) -> dict[str, Any]:
        """The arguments of the call, its generators as they were, callbacks left out."""

        def rewound(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(rewound(v) for v in value) if _generators({"": value}) else value
            if not isinstance(value, torch.Generator):
                return value
            copy = torch.Generator(value.device)
            copy.set_state(self.generators[id(value)])
            return copy

        silent = {name: None for name in ("callback_on_step_end", "callback") if name in self.arguments}
        return {name: rewound(value) for name, value in self.arguments.items()} | silent


class PipelineField:
    """The velocity field of a recorded call: `field(x, sigma) -> v`, after guidance.

    It works inside the block and after it. x is [batch, *latent] as the loop holds it, sigma a time of the rollout.
    """

    def __init__(self, record: Record) -> None:
        self.record = record

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the modules that the loop calls."""
        for module in self.record.templates:
            yield from module.parameters()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """One model call (two or more with classifier-free guidance).

        Raises:
            SamplerError: sigma is not a time of the rollout.
        """
        times = self.record.times
        if sigma.dim() or float(sigma) not in times[:-1]:
            raise SamplerError(
                f"the pipeline's field was called at sigma = {sigma.tolist()}, which is no time of its sampler: "
                f"{times[:-1]}."
            )
        return _Entry(self.record, times.index(float(sigma)), x, torch.is_grad_enabled()).velocity()

    def decode(self, x: Tensor) -> Any:
        """Latents [batch, *latent] through the pipeline's own tail: its images, with gradient."""
        return _Entry(self.record, len(self.record.times) - 1, x, True).decoded()


class _Stop(BaseException):
    """Leaves the pipeline's `__call__` with the velocity."""

    def __init__(self, velocity: Tensor) -> None:
        super().__init__()
        self.velocity = velocity


class _Entry:
    """One re-entry: `step` skips the model calls before the wanted step and substitutes the latents there."""

    def __init__(self, record: Record, step: int, x: Tensor, gradient: bool) -> None:
        self.record, self.step, self.x, self.gradient = record, step, x, gradient
        # Latents are substituted where the loop takes them from the scheduler: the first step gets one before it.
        self.skipped = max(step, 1)
        self.count = 0
        self.skipping: contextlib.ExitStack

    def velocity(self) -> Tensor:
        """What the loop passes to `scheduler.step` at the step."""
        try:
            self._run(self.record.again())
        except _Stop as stop:
            return stop.velocity
        raise SamplerError(
            f"{self.record.base.__name__}'s loop, entered again, ended after {self.count} calls of scheduler.step, "
            f"before step {self.step}: its arguments (prompt embeddings, images) were changed after the recorded call."
        )

    def decoded(self) -> Any:
        """What the pipeline returns for the latents."""
        images = self._run(self.record.again() | {"output_type": "pt", "return_dict": True})
        return next(iter(images.values())) if hasattr(images, "values") else images[0]

    def _run(self, arguments: dict[str, Any]) -> Any:
        pipe, scheduler = self.record.pipe, self.record.pipe.scheduler
        call = inspect.unwrap(self.record.base.__call__)
        encodings = iter(self.record.encodings)
        progress = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        with contextlib.ExitStack() as stack:
            stack.enter_context(_kept(pipe))
            stack.enter_context(_kept(scheduler))
            # of all devices, which is the default, torch warns where there are several
            devices = [self.x.device] if self.x.is_cuda else []
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.no_grad())
            torch.set_rng_state(self.record.random)
            for device in devices:
                torch.cuda.set_rng_state(self.record.random_cuda[device.index or 0], device)
            self.skipping = stack.enter_context(contextlib.ExitStack())
            for module, outputs in self.record.templates.items():
                # what torch calls instead of forward and its hooks (offloading, FSDP): a skipped call runs neither
                self.skipping.enter_context(_replaced(module, "_compiled_call_impl", _zeros(outputs)))
            set_timesteps = type(scheduler).set_timesteps.__get__(scheduler)
            scheduler.__dict__["set_timesteps"] = wrapped(set_timesteps, self._set_timesteps)
            scheduler.__dict__["step"] = self._step
            pipe.__dict__["_progress_bar_config"] = progress
            if self.record.encodings:
                pipe.__dict__["encode_prompt"] = lambda *args, **kwargs: next(encodings)
            return call(pipe, **arguments)

    def _set_timesteps(self, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler = self.record.pipe.scheduler
        if self.step == 0:
            scheduler.timesteps = torch.cat([scheduler.timesteps[:1], scheduler.timesteps])

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count > self.skipped:
            raise _Stop(model_output)
        if self.step > 0:  # masks are blended in at the noise level that the scheduler's own index says
            scheduler = self.record.pipe.scheduler
            type(scheduler).step(scheduler, model_output, timestep, sample, *args, **kwargs)
        if self.count == self.skipped:
            self.skipping.close()
            torch.set_grad_enabled(self.gradient)
            sample = self.x
        return (sample,) if kwargs.get("return_dict") is False else _Sample(sample)


class _Sample(tuple[Tensor]):
    """A scheduler's output, read by name or by index."""

    __slots__ = ()

    def __new__(cls, sample: Tensor) -> _Sample:
        return super().__new__(cls, (sample,))

    @property
    def prev_sample(self) -> Tensor:
        """The next latents."""
        return self[0]


def wrapped(function: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    """`around(function, ...)` under the signature of the function, which diffusers inspects."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    call.__signature__ = inspect.signature(function)  # pyright: ignore[reportFunctionMemberAccess]
    call.__name__ = function.__name__
    return call


@contextlib.contextmanager
def _kept(thing: Any) -> Generator[None]:
    """Puts an object's attributes back."""
    before = dict(thing.__dict__)
    try:
        yield
    finally:
        thing.__dict__.clear()
        thing.__dict__.update(before)


@contextlib.contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Generator[None]:
    """Shadows an attribute of the class by one of the object."""
    before = thing.__dict__.get(name, _MISSING)
    thing.__dict__[name] = value
    try:
        yield
    finally:
        thing.__dict__.pop(name)
        if before is not _MISSING:
            thing.__dict__[name] = before


def _generators(arguments: dict[str, Any]) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for value in arguments.values():
        found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, torch.Generator)]
    return found


def _shape(value: Any) -> Any:
    return (torch.empty_like(value, device="meta"), value.device) if isinstance(value, Tensor) else value


def _zeros(templates: list[Any]) -> Callable[..., Any]:
    """A stand-in for a module's forward: zeros of the recorded shapes, call by call, step by step."""
    count = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        template = templates[count % len(templates)]
        count += 1
        return _filled(template)

    return forward


def _filled(template: Any) -> Any:
    def leaf(value: Any) -> bool:
        return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor) and value[0].is_meta

    return tree_map(lambda v: torch.zeros_like(v[0], device=v[1]) if leaf(v) else v, template, is_leaf=leaf)
