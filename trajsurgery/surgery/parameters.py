"""What trains: the leaves that receive a velocity field's gradient."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import SamplerError, suggest
from trajsurgery.plans.nodes import Node, Noise, Velocity
from trajsurgery.surgery.validation import call_field

Field = Callable[[Tensor, Tensor], Tensor]
"""A velocity field: field(x, sigma) -> v, with x and v [batch, *latent] and sigma 0-dim or [batch], in [0, 1]."""

Fields = Field | Mapping[str | None, Field]
"""One field, or several by name; the default one's name is None."""

Params = Iterable[Tensor] | Mapping[str, Tensor] | None

_leaves_of_fields: weakref.WeakKeyDictionary[Any, tuple[Tensor, ...]] = weakref.WeakKeyDictionary()


def field_named(fields: Fields, name: str | None) -> Field:
    """Return the field of that name, or raise SamplerError if there is none."""
    by_name: Mapping[str | None, Field] = fields if isinstance(fields, Mapping) else {None: fields}
    if name not in by_name:
        hint = suggest(name or "", [known for known in by_name if known])
        raise SamplerError(
            f"the plan calls the field {name!r}, and the fields given are {[*by_name]}.{hint} Run it with a mapping of "
            "names to fields, {None: default_field, 'guided': other_field}."
        )
    return by_name[name]


def has_trainable_parameters(field: Field) -> bool:
    """Whether the field has parameters that require a gradient."""
    return hasattr(field, "parameters") and any(p.requires_grad for p in field.parameters())  # pyright: ignore[reportFunctionMemberAccess]


def leaves(field: Field, x: Tensor, sigma: Tensor, required: bool = True) -> tuple[Tensor, ...]:
    """Return the leaves that the field trains: those among its own parameters, else those that its velocity depends on.

    The latter are the leaves of the autograd graph of one call `field(x, sigma)`, made once for each field. It raises
    SamplerError if one is required and there is none.
    """
    parameters: Callable[[], Iterable[Tensor]] | None = getattr(field, "parameters", None)
    return trainable_only(parameters() if parameters else _leaves_of_call(field, x, sigma), required)


def leaves_by_field(
    fields: Fields, sources: Sequence[Node], trajectory: Any, params: Params = None
) -> dict[str | None, tuple[Tensor, ...]]:
    """Return what trains in every field that is called, by the field's name: `params`, or the field's own leaves.

    `sources` are the calls that a gradient reaches, and `noise()`, beside which all fields may be frozen (ReNO). It
    raises SamplerError if nothing trains.
    """
    calls = {call.field: call for call in reversed(sources) if isinstance(call, Velocity)}  # the first of each field
    leaves_of: dict[str | None, tuple[Tensor, ...]] = {}
    if params is not None:
        leaves_of = dict.fromkeys(calls or [None], trainable_only(params, required=False))
    else:
        for name, call in calls.items():
            field, x, sigma = field_named(fields, name), trajectory[call.t], trajectory.sigma(call.t)
            leaves_of[name] = leaves(field, x, sigma, required=False)
    trainable_only([leaf for part in leaves_of.values() for leaf in part], Noise not in map(type, sources))
    return leaves_of


def leaves_of_calls(
    fields: Fields, sources: Sequence[Node], trajectory: Any, params: Params = None
) -> tuple[Tensor, ...]:
    """Return what trains in all fields together, each leaf once; see `leaves_by_field`."""
    parts = leaves_by_field(fields, sources, trajectory, params).values()
    return tuple({id(leaf): leaf for part in parts for leaf in part}.values())


def trainable_only(params: Iterable[Tensor] | Mapping[str, Tensor], required: bool = True) -> tuple[Tensor, ...]:
    """Return the parameters that require a gradient, or raise SamplerError if one is required and there is none."""
    several = isinstance(params, Iterable) and not isinstance(params, Tensor | nn.Module)  # pyright: ignore[reportUnnecessaryIsInstance]
    parameters = tuple(params.values() if isinstance(params, Mapping) else params) if several else ()
    others = [f"{type(p).__name__}s" for p in parameters if not isinstance(p, Tensor)]  # pyright: ignore[reportUnnecessaryIsInstance]
    if others or not several:
        raise SamplerError(
            f"params= received {others[0] if others else f'a {type(params).__name__}'}: it takes several tensors "
            "(model.parameters(), [weight]), or a mapping of names to tensors (dict(model.named_parameters()))."
        )
    trained = tuple(p for p in parameters if p.requires_grad)
    if required and not trained:
        raise SamplerError(
            "no parameter of the field requires a gradient: the plan has nothing to train. Call requires_grad_() on "
            "what is to train, or pass params=."
        )
    return trained


def _leaves_of_call(field: Field, x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    with contextlib.suppress(TypeError):  # neither hashable nor weakly referable: call it anew
        if _leaves_of_fields.get(field):  # a field without any was frozen, and may train by now
            return _leaves_of_fields[field]
    with torch.enable_grad():
        leaves_of_field = _leaves_of(call_field(field, x.detach(), sigma))
    with contextlib.suppress(TypeError):
        _leaves_of_fields[field] = leaves_of_field
    return leaves_of_field


def check_leaves(v: Tensor, x: Tensor, trained: Sequence[Tensor]) -> Tensor:
    """Return a call's value if it depends on no leaf besides its input and those that train; else raise SamplerError.

    A field may have got other leaves since they were looked up (unfrozen, replaced): they would silently get no
    gradient.
    """
    expected = {id(leaf) for leaf in (x, *trained)}
    missed = [tuple(leaf.shape) for leaf in _leaves_of(v) if id(leaf) not in expected]
    if missed:
        raise SamplerError(
            f"the field depends on leaves of shapes {missed} that it did not depend on when its parameters were looked "
            "up, or that its parameters() do not hold: recompute would drop their gradients. Name what trains with "
            "params=."
        )
    return v


def _leaves_of(out: Tensor) -> tuple[Tensor, ...]:
    """Return the leaves of a tensor's graph."""
    if out.grad_fn is None:
        return (out,) if out.requires_grad else ()
    stack: list[Any] = [out.grad_fn]
    seen: dict[Any, None] = {}
    while stack:
        if (node := stack.pop()) is not None and node not in seen:
            seen[node] = None
            stack.extend(parent for parent, _ in node.next_functions)
    return tuple(node.variable for node in seen if hasattr(node, "variable"))
