"""The record of one pipeline call: its arguments and random state, and results that a replay need not compute again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from trajsurgery.errors import SamplerError
from trajsurgery.pipelines.callback_changes import CALLBACKS, CallbackChanges, own_containers
from trajsurgery.pipelines.guidance import GuidanceGradient, GuidancePasses
from trajsurgery.pipelines.scheduler import Schedule, shadow_attribute
from trajsurgery.pipelines.timestep_inputs import TimestepInputs


@dataclass
class CallRecord:
    """One call of a pipeline: everything needed to replay its loop from any step."""

    pipe: Any
    base: type
    """The pipeline's own class."""
    arguments: dict[str, Any]
    generators: dict[int, Tensor]
    """{id of a generator among the arguments: its state when the call began}."""
    random: Tensor
    """State of the CPU's global generator when the call began."""
    random_cuda: list[Tensor]
    """States of the GPUs' generators."""
    guidance: GuidanceGradient
    encodings: dict[tuple[int, str], list[Any]] = field(default_factory=dict[tuple[int, str], list[Any]])
    """{(id of the pipe or a component, method name): its results, call by call}."""
    templates: dict[nn.Module, list[Any]] = field(default_factory=dict[nn.Module, list[Any]])
    """Results of the modules that the loop called, call by call; large tensors on the meta device (`trim`)."""
    clock: TimestepInputs = field(default_factory=TimestepInputs)
    """The timestep inputs of the modules."""
    watching: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """The hooks of `watch`."""
    size: float = math.inf
    """Tensors of results with more numbers than this are kept as shapes."""
    timesteps: list[Any] = field(default_factory=list[Any])
    """Timestep arguments of `scheduler.step`, call by call."""
    announced: bool = False
    """Whether the pipeline created its progress bar before the loop."""
    carried: str | None = None
    """What carries tensors from one model call to the next beside the latents, if that was seen."""
    arrived: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    """Replays (call, skipped steps) whose timestep was checked against the recorded one."""
    prepared: list[Tensor] = field(default_factory=list[Tensor])
    """What the pipeline's methods that prepare latents have returned, until the loop's first step."""
    own_latents: bool = False
    """Whether the loop begins with the very tensor that such a method returns, and no other there is like it."""
    doubled: bool = False
    """Whether the first step's latents can only be substituted after another step."""
    changes: CallbackChanges = field(default_factory=CallbackChanges)
    """What the call's step callback changes beside the latents."""
    schedule: Schedule = field(init=False)
    start: Tensor = field(init=False)
    """x_T at the start of the loop."""

    @classmethod
    def of(
        cls, pipe: Any, base: type, args: tuple[Any, ...], kwargs: dict[str, Any], guidance: GuidanceGradient = "both"
    ) -> CallRecord:
        """Return the record of a call that is about to be made."""
        bound = inspect.signature(inspect.unwrap(base.__call__)).bind(pipe, *args, **kwargs)
        bound.apply_defaults()
        arguments: dict[str, Any] = own_containers(dict(bound.arguments))
        arguments.pop(next(iter(arguments)))
        arguments.update(arguments.pop("kwargs", {}))
        states = {id(g): g.get_state() for g in _generators(arguments)}
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(pipe, base, arguments, states, torch.get_rng_state(), gpus, guidance)

    def with_recorded_callback(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the call's arguments, the step callback replaced by one whose changes are recorded."""
        bound = inspect.signature(inspect.unwrap(self.base.__call__)).bind(self.pipe, *args, **kwargs)
        for name in CALLBACKS:
            if bound.arguments.get(name) is not None:
                bound.arguments[name] = self.changes.recording(self.pipe, bound.arguments[name])
        return bound.args[1:], bound.kwargs

    def modules(self) -> list[nn.Module]:
        """Return the pipeline's components that are modules."""
        return [m for m in self.pipe.components.values() if isinstance(m, nn.Module)]

    def guidance_passes(self) -> GuidancePasses:
        """Begin to sort the passes of guidance; for guidance "both" none is looked at, and nothing is cut."""
        return GuidancePasses(self.modules() if self.guidance == "conditional" else ())

    def begin(self) -> None:
        """Drop the model calls made before the loop."""
        self.templates.clear()
        self.clock.clear()

    def watch(self) -> None:
        """Record the results of modules called from now on, until `watching` is closed."""

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.carried = self.carried or _cache_of(module, (args, kwargs, output))
            self.clock.note(len(self.timesteps), module, args, kwargs)
            self.templates.setdefault(module, []).append(tree_map(lambda value: _copied(value, self.size), output))

        self.watching.close()
        for module in self.modules():
            self.watching.enter_context(module.register_forward_hook(note, with_kwargs=True))

    def stateless(self) -> None:
        """Raise SamplerError if a model call was seen to depend on earlier ones."""
        if self.carried is not None:
            raise SamplerError(
                f"{self.base.__name__}'s model calls share {self.carried}: a velocity that depends on earlier calls is "
                "no v(x, sigma), and a gradient would pass from step to step beside the plan. Switch it off "
                "(use_kv_cache=False, disable_cache()), or take a pipeline without one."
            )

    def trim(self, size: int) -> None:
        """From now on keep only the shape of larger tensors (hidden states of ControlNets).

        Kept results replace skipped calls, so that second streams and guidance with a memory work as in the rollout.
        """
        self.size = size
        for outputs in self.templates.values():
            outputs[:] = [tree_map(lambda value: _copied(value, size), output) for output in outputs]

    @contextlib.contextmanager
    def encoding(self) -> Generator[None]:
        """Cache the results of the pipeline's encoders, without gradient; those that draw random numbers run again."""
        depth = 0

        def kept(owner: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def encode(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                depth += 1
                try:
                    with torch.no_grad():
                        encoding = function(*args, **kwargs)
                finally:
                    depth -= 1
                if depth == 0 and not _generators({"": args, **kwargs}):
                    self.encodings.setdefault((id(owner), name), []).append(encoding)
                return encoding

            return encode

        with contextlib.ExitStack() as stack:
            for owner, name in encoder_methods(self.pipe, self.base):
                stack.enter_context(shadow_attribute(owner, name, kept(owner, name, getattr(owner, name))))
            yield

    @contextlib.contextmanager
    def preparing(self) -> Generator[None]:
        """Collect what the pipeline's methods that prepare latents return."""

        def noting(prepare: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(prepare)
            def call(*args: Any, **kwargs: Any) -> Any:
                prepared = prepare(*args, **kwargs)
                self.prepared += [value for value in tree_leaves(prepared) if isinstance(value, Tensor)]
                return prepared

            return call

        with contextlib.ExitStack() as stack:
            for name in latents_methods(self.base):
                stack.enter_context(shadow_attribute(self.pipe, name, noting(getattr(self.pipe, name))))
            yield

    def note_own_latents(self, sample: Tensor) -> None:
        """Compare the sample of the loop's first step with what the pipeline has prepared, by identity."""
        self.own_latents = [value is sample for value in self.prepared if is_like(value, sample)] == [True]
        self.prepared.clear()

    def again(self, changes: bool) -> dict[str, Any]:
        """Return the call's arguments: generators reset, of callbacks the recorded changes, if asked."""

        def rewound(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(rewound(v) for v in value) if _generators({"": value}) else value
            if not isinstance(value, torch.Generator):
                return value
            copy = torch.Generator(value.device)
            copy.set_state(self.generators[id(value)])
            return copy

        callback = self.changes.replaying(self.pipe) if changes else None
        callbacks = {
            name: callback if self.arguments[name] is not None else None for name in CALLBACKS if name in self.arguments
        }
        return {name: rewound(value) for name, value in own_containers(self.arguments).items()} | callbacks


def encoder_methods(pipe: Any, base: type) -> Iterator[tuple[Any, str]]:
    """Yield the pipeline's `encode_...` methods and its components' `encode`."""
    for name in dir(base):
        if name.startswith("encode_") and callable(getattr(base, name)):
            yield pipe, name
    for component in pipe.components.values():
        if isinstance(component, nn.Module) and callable(getattr(component, "encode", None)):
            yield component, "encode"


def latents_methods(base: type) -> list[str]:
    """Return the names of a pipeline's methods that prepare latents."""
    return [name for name in dir(base) if name.startswith("prepare_") and "latents" in name]


def is_like(value: Any, start: Tensor) -> bool:
    """Whether a value may be the loop's first latents, by shape and kind."""
    return isinstance(value, Tensor) and value.shape == start.shape and value.is_floating_point()


@contextlib.contextmanager
def skipped_calls(templates: dict[nn.Module, list[Any]]) -> Generator[None]:
    """Return recorded results instead of calling the modules; zeros where only shapes were kept."""
    with contextlib.ExitStack() as stack:
        for module, outputs in templates.items():
            # what torch calls instead of forward and its hooks (offloading, FSDP): a skipped call runs neither
            stack.enter_context(shadow_attribute(module, "_compiled_call_impl", _recorded_forward(outputs)))
        yield


def _recorded_forward(templates: list[Any]) -> Callable[..., Any]:
    """Replacement of a module's forward: its recorded results, call by call."""
    recorded = itertools.cycle(templates)
    return lambda *args, **kwargs: _zeros_for_meta(next(recorded))


def _zeros_for_meta(template: Any) -> Any:
    def is_shape(value: Any) -> bool:
        return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor) and value[0].is_meta

    def filled(value: Any) -> Any:
        if is_shape(value):
            return torch.zeros_like(value[0], device=value[1])
        return value.clone() if isinstance(value, Tensor) else value

    return tree_map(filled, template, is_leaf=is_shape)


def _generators(arguments: dict[str, Any]) -> list[torch.Generator]:
    lists = [value if isinstance(value, list | tuple) else [value] for value in arguments.values()]
    return [value for values in lists for value in values if isinstance(value, torch.Generator)]


def _cache_of(module: nn.Module, arguments: Any) -> str | None:
    """Return what a module's call shares with other calls: a cache among its arguments or results, or its own."""
    if getattr(module, "is_cache_enabled", False):
        return f"the cache of {type(module).__name__}.enable_cache()"
    return next((f"a {type(v).__name__}" for v in tree_leaves(arguments) if _holds_tensors(v)), None)


def _holds_tensors(thing: Any, depth: int = 3) -> bool:
    """Whether this is an object of a class unknown to torch with tensors in its attributes."""
    if isinstance(thing, Tensor | nn.Module | type) or not hasattr(thing, "__dict__"):
        return False
    inner = tree_leaves(vars(thing))
    return any(isinstance(v, Tensor) or (depth > 0 and _holds_tensors(v, depth - 1)) for v in inner)


def _copied(value: Any, size: float) -> Any:
    """Copy a result, since some loops write into it afterwards; of a large tensor keep shape and device."""
    if not isinstance(value, Tensor):
        return value
    return (torch.empty_like(value, device="meta"), value.device) if value.numel() > size else value.detach().clone()
