"""Frozen, hash-consed expression nodes: what all primitives of the language share.

Structurally equal nodes are one object, so a model call that two paths share is made once, and equality of plans is
identity of nodes.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, dataclass_transform

from trajsurgery.errors import PlanError
from trajsurgery.plans.step_gain import StepGain

Time = int | str
"""A timestep index, T (noise) down to 0 (image), or a name to bind later; "T" is the trajectory's first time."""

Factor = float | str | StepGain
"""A number, a name to bind later, or (of a scale) a number that the sampler's times make."""

Draw = int | str
"""Which noise a renoised sample is made of: a count, or "rollout" for the rollout's own x_T."""

START = "T"
"""The name that a run binds to the trajectory's length."""

PARENTS = ("x", "v", "velocities")
"""The fields of a node that hold nodes."""


@dataclass_transform(frozen_default=True)
class _HashConsed(type):
    """Gives back the node that already has these fields (hash-consing, as tinygrad's UOps)."""

    _cache: ClassVar[weakref.WeakValueDictionary[tuple[Any, ...], Node]] = weakref.WeakValueDictionary()

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        node: Node = super().__call__(*args, **kwargs)
        key = (cls, *((type(value), value) for value in (getattr(node, f.name) for f in fields(node))))
        try:
            return _HashConsed._cache.setdefault(key, node)
        except TypeError:
            raise PlanError(
                f"a {node.op} received {node.settings()}: a setting is a number or a name, none that can change, such "
                "as a list or a dict.",
                rules=("setting",),
            ) from None


@dataclass(frozen=True, eq=False, repr=False)
class Node(metaclass=_HashConsed):
    """A value of the plan. Hash and equality are identity: equal nodes are the same object.

    Every subclass is a frozen dataclass, `op` its name in snake case. Its parents are the fields `x` (a latent), `v` (a
    velocity) and `velocities`; its time is the field `time` or `to`, else that of its first parent.
    """

    op: ClassVar[str]

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, eq=False, repr=False)(cls)
        cls.op = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    @property
    def t(self) -> Time:
        """The time at which the value lives."""
        values = vars(self)
        return values["time"] if "time" in values else values["to"] if "to" in values else self.parents[0].t

    @property
    def inputs(self) -> dict[str, Any]:
        """The fields that are nodes."""
        return {name: value for name, value in vars(self).items() if name in PARENTS}

    @property
    def parents(self) -> tuple[Node, ...]:
        """The nodes that this one is computed from, in the order of the fields."""
        values = self.inputs.values()
        return tuple(node for value in values for node in (value if isinstance(value, tuple) else (value,)))

    def settings(self) -> dict[str, Any]:
        """The fields that are not nodes."""
        return {name: value for name, value in vars(self).items() if name not in PARENTS}

    def replace(self, new: Mapping[Node, Node], rename: Callable[[str, Any], Any]) -> Self:
        """The same node on other parents, with `rename(field, value)` for its settings."""
        inputs = {name: tuple(new[v] for v in value) if name == "velocities" else new[value]
                  for name, value in self.inputs.items()}  # fmt: skip
        return type(self)(**inputs, **{name: rename(name, value) for name, value in self.settings().items()})

    def __repr__(self) -> str:
        return f"<{self.op} at t={self.t}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def walk(outputs: Sequence[Node]) -> Iterator[Node]:
    """Every node once, parents before children, in an order that only the plan's structure decides."""
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(node, False) for node in reversed(outputs)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in reversed(node.parents))
