"""What trains: the leaves that receive a velocity field's gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import SamplerError
from trajsurgery.surgery.validation import call_field

Field = Callable[[Tensor, Tensor], Tensor]
"""A velocity field: field(x, sigma) -> v, with x and v [batch, *latent] and sigma 0-dim or [batch], in [0, 1]."""

Fields = Field | Mapping[str | None, Field]
"""One field, or several by name; the default one's name is None."""

Params = Iterable[Tensor] | Mapping[str, Tensor] | None

_found: weakref.WeakKeyDictionary[Any, tuple[Tensor, ...]] = weakref.WeakKeyDictionary()


def field_named(fields: Fields, name: str | None) -> Field:
    """Return the field of that name.

    Raises:
        SamplerError: there is none.
    """
    if not isinstance(fields, Mapping):
        if name is None:
            return fields
        names: list[str | None] = [None]
    elif name in fields:
        return fields[name]
    else:
        names = list(fields)
    raise SamplerError(
        f"the plan calls the field {name!r}, and the fields given are {names}. Run it with a mapping of names to "
        "fields, {None: default_field, 'guided': other_field}."
    )


def has_trainable_parameters(field: Field) -> bool:
    """Whether the field has parameters that require a gradient."""
    return hasattr(field, "parameters") and any(p.requires_grad for p in field.parameters())  # pyright: ignore[reportFunctionMemberAccess]


def leaves(field: Field, x: Tensor, sigma: Tensor, params: Params = None, required: bool = True) -> tuple[Tensor, ...]:
    """Return the leaves that the field trains.

    They are `params` if given, else the field's own parameters, else the leaves of the autograd graph of one call
    `field(x, sigma)`, which is made once for each field.

    Args:
        required: False where `noise()` trains too: the field may be frozen (ReNO).

    Raises:
        SamplerError: no leaf requires a gradient, and one is required.
    """
    if params is not None:
        return trainable_only(params, required)
    return trainable_only(
        field.parameters()  # pyright: ignore[reportFunctionMemberAccess]
        if hasattr(field, "parameters")
        else _cached(field, x, sigma),
        required,
    )


def trainable_only(params: Iterable[Tensor] | Mapping[str, Tensor], required: bool = True) -> tuple[Tensor, ...]:
    """Return the parameters that require a gradient.

    Raises:
        SamplerError: none does, and one is required.
    """
    if isinstance(params, Tensor | nn.Module) or not isinstance(params, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SamplerError(
            f"params= received a {type(params).__name__}: it takes several tensors (model.parameters(), [weight]), "
            "or a mapping of names to tensors."
        )
    parameters = tuple(params.values() if isinstance(params, Mapping) else params)
    others = [type(p).__name__ for p in parameters if not isinstance(p, Tensor)]  # pyright: ignore[reportUnnecessaryIsInstance]
    if others:
        raise SamplerError(
            f"params= received {others[0]}s: it takes tensors, or a mapping of names to tensors "
            "(model.parameters(), dict(model.named_parameters()))."
        )
    trained = tuple(p for p in parameters if p.requires_grad)
    if required and not trained:
        raise SamplerError(
            "no parameter of the field requires a gradient: the plan has nothing to train. Call requires_grad_() on "
            "what is to train, or pass params=."
        )
    return trained


def _cached(field: Field, x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    try:
        if field not in _found:
            _found[field] = _walk(field, x, sigma)
        return _found[field]
    except TypeError:  # neither hashable nor weakly referable: walk anew
        return _walk(field, x, sigma)


def _walk(field: Field, x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    """Return the leaves of the graph of one call."""
    with torch.enable_grad():
        return _leaves_of(call_field(field, x.detach(), sigma))


def checked_call(call: Callable[[Tensor], Tensor], trained: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the call with a check that its value depends on no leaf besides its input and those that train.

    A field may have got other leaves since they were looked up (unfrozen, replaced): they would silently get no
    gradient.
    """

    def checked(x: Tensor) -> Tensor:
        out = call(x)
        expected = {id(leaf) for leaf in (x, *trained)}
        missed = [tuple(leaf.shape) for leaf in _leaves_of(out) if id(leaf) not in expected]
        if missed:
            raise SamplerError(
                f"the field depends on leaves of shapes {missed} that it did not depend on when its parameters were "
                "looked up, or that its parameters() do not hold: recompute would drop their gradients. Name what "
                "trains with params=."
            )
        return out

    return checked


def _leaves_of(out: Tensor) -> tuple[Tensor, ...]:
    stack: list[Any] = [out.grad_fn]
    seen, leaves_found = set[Any](), list[Tensor]()
    if out.grad_fn is None and out.requires_grad:
        leaves_found.append(out)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves_found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return tuple(leaves_found)
