"""What a pipeline's step callback changes beside the latents: recorded step by step, and made again in a replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from trajsurgery.surgery.validation import change_count

CALLBACKS = "callback_on_step_end", "callback"
"""The arguments of pipelines' calls that take a step callback."""
_ABSENT = object()


@dataclass(frozen=True)
class StepChanges:
    """What one call of the callback changed."""

    attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the pipeline, such as `_guidance_scale`."""
    results: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the loop takes from the callback, such as `prompt_embeds`, without `latents`."""

    def __bool__(self) -> bool:
        return bool(self.attributes or self.results)


@dataclass
class CallbackChanges:
    """The changes that the callback of one pipeline call makes, step by step."""

    steps: list[StepChanges] = field(default_factory=list[StepChanges])
    before: dict[str, Any] = field(default_factory=dict[str, Any])
    """The attributes that were changed, as they were before."""

    def recording(self, pipe: Any, callback: Any) -> Any:
        """Return the callback with its changes recorded; an instance of diffusers' callback classes stays one."""

        def record(*args: Any, **kwargs: Any) -> Any:
            given: Any = next((a for a in (*args, *kwargs.values()) if isinstance(a, Mapping)), {})
            before, old, marks = own_containers(vars(pipe)), _marks(vars(pipe)), _marks(given)
            result = callback(*args, **kwargs)
            now, new = _marks(vars(pipe)), _marks(result if isinstance(result, Mapping) else {})
            changed = [name for name in old | now if old.get(name) != now.get(name)]
            taken = [name for name in new if name != "latents" and new[name] != marks.get(name)]
            self.before = {name: before.get(name, _ABSENT) for name in changed} | self.before
            attributes = {name: _copied(vars(pipe).get(name, _ABSENT)) for name in changed}
            self.steps.append(StepChanges(attributes, {name: _copied(result[name]) for name in taken}))
            return result

        if not hasattr(callback, "tensor_inputs"):
            return record
        kind = type(callback)
        members = {"__call__": lambda _, *args, **kwargs: record(*args, **kwargs)}
        recorded = object.__new__(type(kind.__name__, (kind,), members))
        recorded.__dict__ = vars(callback)
        return recorded

    def replaying(self, pipe: Any) -> Callable[..., Any] | None:
        """Return a callback that makes the changes again; None if there are none."""
        if not any(self.steps):
            return None
        steps = iter(self.steps)

        def replay(*_: Any, **__: Any) -> dict[str, Any]:
            step = next(steps, StepChanges())
            _set(pipe, step.attributes)
            return _copied(step.results)

        return replay

    def rewind(self, pipe: Any) -> None:
        """Set the pipeline's attributes to what they were before the first change."""
        _set(pipe, self.before)

    def differ(self, first: int, last: int) -> bool:
        """Whether something was changed between two calls of the scheduler."""
        return any(self.steps[first:last])


def _set(pipe: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if value is _ABSENT:
            vars(pipe).pop(name, None)
        else:
            vars(pipe)[name] = _copied(value)


def _marks(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a change of each value, in place or not."""
    marks: dict[str, Any] = {}
    for name, value in values.items():
        leaves, form = tree_flatten(value)
        marks[name] = form, [_mark(leaf) for leaf in leaves]
    return marks


def _mark(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return id(leaf), change_count(leaf)
    return (type(leaf), leaf) if isinstance(leaf, int | float | str | None) else id(leaf)


def own_containers(values: dict[str, Any]) -> dict[str, Any]:
    """Copy the dicts and lists, which loops and callbacks write into; what is in them stays the same."""
    return tree_map(lambda leaf: leaf, values)


def _copied(value: Any) -> Any:
    """Copy containers and tensors."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
