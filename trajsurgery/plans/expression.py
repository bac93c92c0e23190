"""Frozen, hash-consed expression nodes: what all primitives of the language share.

Structurally equal nodes are one object, so a model call that two paths share is made once, and equality of plans is
identity of nodes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, dataclass_transform

from trajsurgery.errors import PlanError

Time = int | str
"""A timestep index, T (noise) down to 0 (image), or a name to bind later; "T" is the trajectory's first time."""

Factor = float | str
"""A number, or a name to bind later."""

Draw = int | str
"""Which noise a renoised sample is made of: a count, or "rollout" for the rollout's own x_T."""

START = "T"
"""The name that a run binds to the trajectory's length."""

N = TypeVar("N", bound="Node")


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
    """A value of the plan. Hash and equality are identity: equal nodes are the same object."""

    op: ClassVar[str]

    @property
    def t(self) -> Time:
        """The time at which the value lives."""
        raise NotImplementedError

    @property
    def parents(self) -> tuple[Node, ...]:
        """The nodes that this one is computed from, in the order of the fields."""
        found: list[Node] = []
        for field in fields(self):
            value = getattr(self, field.name)
            found.extend(value if field.name == "velocities" else [value] if isinstance(value, Node) else [])
        return tuple(found)

    def settings(self) -> dict[str, Any]:
        """The fields that are not nodes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("x", "v", "velocities")}

    def replace(self: N, parents: Sequence[Node], rename: Callable[[str, Any], Any]) -> N:
        """The same node on other parents, with `rename(field, value)` for its settings."""
        queue = iter(parents)
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "velocities":
                values[field.name] = tuple(next(queue) for _ in value)
            else:
                values[field.name] = next(queue) if isinstance(value, Node) else rename(field.name, value)
        return type(self)(**values)

    def __repr__(self) -> str:
        return f"<{self.op} at t={self.t}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    def __copy__(self: N) -> N:
        return self

    def __deepcopy__(self: N, memo: Any) -> N:
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
