"""Encode each prompt once: cache what the pipeline's own `encode_...` methods return.

This works for any pipeline class. The pipeline's `__call__` runs up to the first transformer call, which makes all
calls of its `encode_...` methods. Encoding one prompt twice shows which dimension of a result counts prompts. Results
stay on the CPU (4 MiB a prompt for FLUX.1-dev's 512 tokens).
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
from trajsurgery.pipelines.call_record import encoder_methods

_PLACE = "_encodings_of_trajsurgery"
_TRAINS = ("transformer", "transformer_2", "vae")


class PromptCache:
    """Encodings of a list of prompts, each made once. Calling it returns arguments for the pipeline."""

    def __init__(self, pipe: Any, texts: Iterable[str], call: Mapping[str, Any] | None = None, batch: int = 64) -> None:
        self._length = _sequence_length(pipe)
        encodings = PipelineEncodings.of(pipe)
        unique = [text for text in dict.fromkeys(texts) if text not in encodings.texts]
        for start in range(0, len(unique), batch):
            encodings.encode(unique[start : start + batch], {**(call or {}), **self._length})

    def __call__(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return pipeline arguments for these prompts; the pipeline then encodes none of them."""
        return {"prompt": list(texts), **self._length}


def _sequence_length(pipe: Any) -> dict[str, int]:
    """Return the number of tokens that the pipeline encodes, at most what its T5 tokenizer allows."""
    taken = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    names = [name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if getattr(pipe, name, None) is not None]
    if taken is None or not names or not isinstance(taken.default, int):
        return {}
    return {taken.name: min(taken.default, getattr(pipe, names[0]).model_max_length)}


def free_text_encoders(pipe: Any, place: torch.device | str = "cpu") -> tuple[str, ...]:
    """Move the text encoders to `place` and take them off the pipeline; return their names.

    Their memory is freed unless somebody else holds them. The pipeline can't encode new prompts afterwards.
    """
    encodings = PipelineEncodings.of(pipe)
    for name in encodings.encoders:
        getattr(pipe, name).to(place)
        setattr(pipe, name, None)
    names, encodings.gone = tuple(sorted(encodings.encoders)), True
    encodings.encoders.clear()
    return names


class PipelineEncodings:
    """The cached results of one pipeline's `encode_...` methods. It replaces those methods on the pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.texts: set[str] = set()
        """Prompts that were encoded in advance."""
        self.encoders: set[str] = set()
        """Names of the components that encoded them."""
        self.gone = False
        self.busy = False
        for owner, name in list(encoder_methods(pipe, type(pipe))):
            if owner is pipe:
                pipe.__dict__[name] = _CachedEncoder(self, getattr(pipe, name))

    @classmethod
    def of(cls, pipe: Any) -> PipelineEncodings:
        """Return the cache of a pipeline; create it the first time."""
        if _PLACE not in pipe.__dict__:
            pipe.__dict__[_PLACE] = cls(pipe)
        return pipe.__dict__[_PLACE]

    def encode(self, texts: Sequence[str], call: Mapping[str, Any]) -> None:
        """Run the pipeline for these prompts up to the first transformer call, which encodes all of them."""

        def reached(*_: Any) -> None:
            raise _LoopReached

        hook = self.pipe.transformer.register_forward_pre_hook(reached, prepend=True)  # before FSDP gathers weights
        try:
            self.pipe(prompt=list(texts), **call, num_inference_steps=2, generator=torch.Generator())
        except _LoopReached:
            pass
        finally:
            hook.remove()
        self.texts.update(texts)

    def watched(self, method: Any, arguments: dict[str, Any]) -> Any:
        """Call an encoder method without gradient, and record which components it uses."""
        if self.gone:
            raise RecipeError(
                f"{type(self.pipe).__name__} can't encode {_prompts_of(arguments)}: its text encoders have been "
                "let go. Encode all prompts before, or keep them with --train.keep-encoders."
            )
        owners = {
            id(part): name
            for name, component in self.pipe.components.items()
            if isinstance(component, nn.Module) and name not in _TRAINS
            for part in component.modules()
        }

        def record(module: nn.Module, _: Any) -> None:
            if id(module) in owners:
                self.encoders.add(owners[id(module)])

        hook = register_module_forward_pre_hook(record)
        self.busy = True
        try:
            with torch.no_grad():
                return method(**arguments)
        finally:
            self.busy = False
            hook.remove()


class _LoopReached(BaseException):
    """The pipeline has reached its denoising loop."""


@dataclass(frozen=True, eq=False)
class _ResultLayout:
    """How the result for several prompts is joined from results for single ones."""

    tree: TreeSpec
    dims: tuple[int | None, ...]
    """For each leaf, the dimension that counts prompts; -1: a list with one entry each; None: the same for all."""
    alone: list[Any]
    """The leaves for a single prompt."""
    masks: set[int] = field(default_factory=set[int])
    """Leaves that are masks [prompts, tokens], or None where no prompt is padded."""


class _CachedEncoder:
    """Replacement of one `encode_...` method."""

    def __init__(self, owner: PipelineEncodings, method: Any) -> None:
        self.owner, self.method = owner, method
        self.signature = inspect.signature(method)
        self.forms: dict[str, _ResultLayout] = {}
        self.rows: dict[tuple[str, ...], list[Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the joined encodings; encode prompts that are new."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("kwargs", {})
        if isinstance(arguments.get("prompt"), str):
            arguments["prompt"] = [arguments["prompt"]]
        count = len(_prompts_of(arguments))
        if self.owner.busy or not count or any(isinstance(v, Tensor) for v in arguments.values()):
            return self.method(*args, **kwargs)
        rest = {n: v for n, v in arguments.items() if n != "device" and not _is_prompt_list(v, count)}
        kind = repr(sorted(rest.items(), key=lambda item: item[0]))
        keys = [
            (kind, *(f"{n}={v[i]}" for n, v in arguments.items() if _is_prompt_list(v, count))) for i in range(count)
        ]
        new = list({key: i for i, key in enumerate(keys) if key not in self.rows}.values())
        if new:
            self._encode(kind, arguments, count, new, keys)
        return self._joined(self.forms[kind], [self.rows[key] for key in keys])

    def _encode(
        self, kind: str, arguments: dict[str, Any], count: int, new: list[int], keys: list[tuple[str, ...]]
    ) -> None:
        def made(which: list[int]) -> tuple[list[Any], TreeSpec]:
            some = {n: [v[i] for i in which] if _is_prompt_list(v, count) else v for n, v in arguments.items()}
            return tree_flatten(self.owner.watched(self.method, some), is_leaf=lambda v: isinstance(v, list))

        if kind not in self.forms:
            (alone, tree), (twice, _) = made(new[:1]), made(new[:1] * 2)
            self.forms[kind] = _ResultLayout(tree, tuple(map(self._dimension, alone, twice)), alone)
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

    def _joined(self, form: _ResultLayout, rows: list[list[Any]]) -> Any:
        dtype = self.owner.pipe.transformer.dtype
        joined: list[Any] = []
        for i, (like, dim) in enumerate(zip(form.alone, form.dims, strict=True)):
            parts = [row[i] for row in rows]
            if i in form.masks:
                parts, like, dim = (
                    [_mask(row, i) for row in rows],
                    next(v for v in form.alone if _is_token_states(v)),
                    0,
                )
            if dim == -1:
                joined.append([_copy_like(v, v, dtype) for part in parts for v in part])
            elif dim is None:
                joined.append(_copy_like(like, like, dtype))
            else:
                joined.append(_copy_like(torch.cat(self._padded(form, parts, dim), dim), like, dtype))
        return tree_unflatten(joined, form.tree)

    def _padded(self, form: _ResultLayout, parts: list[Tensor], dim: int) -> list[Tensor]:
        """Pad shorter encodings with zeros, which their masks exclude."""
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


def _is_prompt_list(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(isinstance(v, str) for v in value)


def _prompts_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return the prompts of a call: its longest list of strings."""
    lists = [list(v) for v in arguments.values() if isinstance(v, list | tuple) and v and _is_prompt_list(v, len(v))]
    return max(lists, key=len, default=[])


def _is_token_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2


def _mask(row: list[Any], i: int) -> Tensor:
    """Return a prompt's mask [1, tokens]; all tokens if it was encoded without one."""
    if row[i] is not None:
        return row[i]
    return torch.ones(next(leaf for leaf in row if _is_token_states(leaf)).shape[:2], dtype=torch.long)


def _row(leaf: Any, dim: int | None, place: int, count: int) -> Any:
    """Return one prompt's part of a leaf, on the CPU."""
    if dim is None:  # a mask, or the same for all
        return leaf[place : place + 1].cpu() if isinstance(leaf, Tensor) and len(leaf) == count else None
    if dim == -1:
        size = len(leaf) // count
        return [v.cpu() if isinstance(v, Tensor) else v for v in leaf[place * size : (place + 1) * size]]
    size = leaf.shape[dim] // count
    return leaf.narrow(dim, place * size, size).cpu()


def _copy_like(value: Any, like: Any, dtype: torch.dtype) -> Any:
    """Copy a leaf to the device of `like`; floating-point numbers get the transformer's dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, dtype if value.is_floating_point() else value.dtype, copy=True)
