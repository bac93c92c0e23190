"""Prompts are encoded once: what a pipe's `encode_...` methods returned is kept by prompt, and answers for them.

Nothing is known of a pipeline's class: its own `__call__` runs up to the transformer's first call, and makes the calls
of its `encode_...` methods that it will make again. Which dimension of a result counts prompts is seen by encoding one
twice. Results are kept on the CPU (4 MiB a prompt for FLUX.1-dev's 512 tokens).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from trajsurgery.errors import RecipeError
from trajsurgery.pipelines.call_record import encoders

_PLACE = "_encodings_of_trajsurgery"
_TRAINS = ("transformer", "transformer_2", "vae")


class Embeddings:
    """The encodings of prompts, each made once; no text encoder runs afterwards."""

    def __init__(self, pipe: Any, texts: Iterable[str], call: Mapping[str, Any] | None = None, batch: int = 64) -> None:
        self._length = _length(pipe)
        known = Encodings.of(pipe)
        unique = [text for text in dict.fromkeys(texts) if text not in known.texts]
        for start in range(0, len(unique), batch):
            known.encode(unique[start : start + batch], {**(call or {}), **self._length})

    def __call__(self, texts: Sequence[str]) -> dict[str, Any]:
        """The arguments of the pipe's call for these prompts, of which it encodes none."""
        return {"prompt": list(texts), **self._length}


def _length(pipe: Any) -> dict[str, int]:
    """The number of tokens that the pipe's own call encodes, but no more than its T5 tokenizer says."""
    taken = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    names = [name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if getattr(pipe, name, None) is not None]
    if taken is None or not names or not isinstance(taken.default, int):
        return {}
    return {taken.name: min(taken.default, getattr(pipe, names[0]).model_max_length)}


def dismiss(pipe: Any, place: torch.device | str = "cpu") -> tuple[str, ...]:
    """Takes the text encoders off their device and off the pipe, which encodes no new prompt from then on.

    Their memory is free if nobody else holds them; somebody who does finds them on the `place`. Returns their names.
    """
    known = Encodings.of(pipe)
    for name in known.encoders:
        getattr(pipe, name).to(place)
        setattr(pipe, name, None)
    found, known.gone = tuple(sorted(known.encoders)), True
    known.encoders.clear()
    return found


class Encodings:
    """What one pipe's `encode_...` methods have returned; it hangs on the pipe and stands for them there."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.texts: set[str] = set()
        """The prompts that were encoded ahead."""
        self.encoders: set[str] = set()
        """The pipe's components that were called for it."""
        self.gone = False
        self.busy = False
        for owner, name in list(encoders(pipe, type(pipe))):
            if owner is pipe:
                pipe.__dict__[name] = _Method(self, getattr(pipe, name))

    @classmethod
    def of(cls, pipe: Any) -> Encodings:
        """Those of the pipe, there from the first time on."""
        if _PLACE not in pipe.__dict__:
            pipe.__dict__[_PLACE] = cls(pipe)
        return pipe.__dict__[_PLACE]

    def encode(self, texts: Sequence[str], call: Mapping[str, Any]) -> None:
        """Runs the pipe's call for the prompts up to its transformer's first: all encodings are made by then."""

        def reached(*_: Any) -> None:
            raise _Reached

        hook = self.pipe.transformer.register_forward_pre_hook(reached)
        try:
            self.pipe(prompt=list(texts), **call, num_inference_steps=2, generator=torch.Generator())
        except _Reached:
            pass
        finally:
            hook.remove()
        self.texts.update(texts)

    def watched(self, method: Any, arguments: dict[str, Any]) -> Any:
        """Calls a method, without gradient, and notes which components it calls."""
        if self.gone:
            raise RecipeError(
                f"{type(self.pipe).__name__} was asked to encode {_texts(arguments)}, and its text encoders have been "
                "let go: encode all prompts before, or keep them with --train.keep-encoders."
            )
        inner = {
            id(part): name
            for name, component in self.pipe.components.items()
            if isinstance(component, nn.Module) and name not in _TRAINS
            for part in component.modules()
        }

        def note(module: nn.Module, _: Any) -> None:
            if id(module) in inner:
                self.encoders.add(inner[id(module)])

        hook = register_module_forward_pre_hook(note)
        self.busy = True
        try:
            with torch.no_grad():
                return method(**arguments)
        finally:
            self.busy = False
            hook.remove()


class _Reached(BaseException):
    """The pipe's loop has begun."""


@dataclass(frozen=True, eq=False)
class _Form:
    """How a method's result is put together of those of single prompts."""

    tree: TreeSpec
    dims: tuple[int | None, ...]
    """The dimension of each leaf that counts prompts (-1: it is a list of them); None: the leaf is the same for all."""
    alone: list[Any]
    """The leaves for one prompt."""
    masks: set[int] = field(default_factory=set[int])
    """Leaves that are None where no prompt is shorter than another, else a mask, [prompts, tokens]."""


class _Method:
    """Stands for a method of a pipe that encodes prompts."""

    def __init__(self, owner: Encodings, method: Any) -> None:
        self.owner, self.method = owner, method
        self.signature = inspect.signature(method)
        self.forms: dict[str, _Form] = {}
        self.rows: dict[tuple[str, ...], list[Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The joined encodings; those that are not known yet are made."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("kwargs", {})
        if isinstance(arguments.get("prompt"), str):
            arguments["prompt"] = [arguments["prompt"]]
        count = len(_texts(arguments))
        if self.owner.busy or not count or any(isinstance(v, Tensor) for v in arguments.values()):
            return self.method(*args, **kwargs)
        rest = {n: v for n, v in arguments.items() if n != "device" and not _listed(v, count)}
        kind = repr(sorted(rest.items(), key=lambda item: item[0]))
        keys = [(kind, *(f"{n}={v[i]}" for n, v in arguments.items() if _listed(v, count))) for i in range(count)]
        new = list({key: i for i, key in enumerate(keys) if key not in self.rows}.values())
        if new:
            self._encode(kind, arguments, count, new, keys)
        return self._joined(self.forms[kind], [self.rows[key] for key in keys])

    def _encode(
        self, kind: str, arguments: dict[str, Any], count: int, new: list[int], keys: list[tuple[str, ...]]
    ) -> None:
        def made(which: list[int]) -> tuple[list[Any], TreeSpec]:
            some = {n: [v[i] for i in which] if _listed(v, count) else v for n, v in arguments.items()}
            return tree_flatten(self.owner.watched(self.method, some), is_leaf=lambda v: isinstance(v, list))

        if kind not in self.forms:
            (alone, tree), (twice, _) = made(new[:1]), made(new[:1] * 2)
            self.forms[kind] = _Form(tree, tuple(map(self._dimension, alone, twice)), alone)
        form, (leaves, _) = self.forms[kind], made(new)
        for place, i in enumerate(new):
            pairs = zip(leaves, form.dims, strict=True)
            self.rows[keys[i]] = [_row(leaf, dim, place, len(new)) for leaf, dim in pairs]
        form.masks.update(i for i, leaf in enumerate(leaves) if form.alone[i] is None and isinstance(leaf, Tensor))

    def _dimension(self, alone: Any, twice: Any) -> int | None:
        if isinstance(alone, list):
            return -1
        if not isinstance(alone, Tensor) or alone.shape == twice.shape:
            return None
        for dim in range(alone.dim()):
            if twice.shape == (*alone.shape[:dim], 2 * alone.shape[dim], *alone.shape[dim + 1 :]):
                return dim
        raise RecipeError(
            f"{type(self.owner.pipe).__name__}.{self.method.__name__} returned {tuple(alone.shape)} for one prompt and "
            f"{tuple(twice.shape)} for it twice: no dimension counts prompts, so that they can't be encoded ahead."
        )

    def _joined(self, form: _Form, rows: list[list[Any]]) -> Any:
        dtype = self.owner.pipe.transformer.dtype
        found: list[Any] = []
        for i, (like, dim) in enumerate(zip(form.alone, form.dims, strict=True)):
            parts = [row[i] for row in rows]
            if i in form.masks:
                parts, like, dim = [_mask(row, i) for row in rows], next(v for v in form.alone if _long(v)), 0
            if dim == -1:
                found.append([_placed(v, v, dtype) for part in parts for v in part])
            elif dim is None:
                found.append(_placed(like, like, dtype))
            else:
                found.append(_placed(torch.cat(self._padded(form, parts, dim), dim), like, dtype))
        return tree_unflatten(found, form.tree)

    def _padded(self, form: _Form, parts: list[Tensor], dim: int) -> list[Tensor]:
        """Encodings of the same length: zeros behind the shorter ones, which their masks leave out."""
        longest = [max(sizes) for sizes in zip(*(part.shape for part in parts))]
        longest[dim] = parts[0].shape[dim]
        if all(list(part.shape) == longest for part in parts):
            return parts
        if not form.masks and not any(isinstance(v, Tensor) and not v.is_floating_point() for v in form.alone):
            raise RecipeError(
                f"{type(self.owner.pipe).__name__}.{self.method.__name__} encodes prompts to the length of the longest "
                "of a batch and gives no mask with them: those of several batches can't be joined."
            )
        gaps = [[most - size for size, most in zip(part.shape, longest)] for part in parts]
        return [nn.functional.pad(v, [w for n in gap[::-1] for w in (0, n)]) for v, gap in zip(parts, gaps)]


def _listed(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(isinstance(v, str) for v in value)


def _texts(arguments: Mapping[str, Any]) -> list[str]:
    """The prompts of a call: its longest list of words."""
    lists = [list(v) for v in arguments.values() if isinstance(v, list | tuple) and v and _listed(v, len(v))]
    return max(lists, key=len, default=[])


def _long(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2


def _mask(row: list[Any], i: int) -> Tensor:
    """A prompt's mask, [1, tokens]; all of its tokens if it was encoded without one."""
    if row[i] is not None:
        return row[i]
    return torch.ones(next(leaf for leaf in row if _long(leaf)).shape[:2], dtype=torch.long)


def _row(leaf: Any, dim: int | None, place: int, count: int) -> Any:
    """One prompt's share of a leaf."""
    if dim is None:  # a mask, or the same for all
        return leaf[place : place + 1].cpu() if isinstance(leaf, Tensor) and len(leaf) == count else None
    if dim == -1:
        size = len(leaf) // count
        return [v.cpu() if isinstance(v, Tensor) else v for v in leaf[place * size : (place + 1) * size]]
    size = leaf.shape[dim] // count
    return leaf.narrow(dim, place * size, size).cpu()


def _placed(value: Any, like: Any, dtype: torch.dtype) -> Any:
    """A copy where the method would have put it; floating point numbers as the transformer has them."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, dtype if value.is_floating_point() else value.dtype, copy=True)
