"""A pipeline's `encode_...` method that encodes each prompt once, into memory or into a folder of encodings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from trajsurgery.errors import RecipeError
from trajsurgery.training.encodings.encoder_fingerprint import UNUSED
from trajsurgery.training.encodings.encoding_folder import EncodingFolder
from trajsurgery.training.encodings.result_layout import ResultLayout, flat

_LONGER = " too"


@dataclass(eq=False)
class EncoderState:
    """What the cached encoders of one pipeline share."""

    pipe: Any
    folder: EncodingFolder | None = None
    """Where encodings lie; in memory if None."""
    encoders: set[str] = field(default_factory=set[str])
    """Names of the components that encoded prompts."""
    gone: bool = False
    """Whether they were taken off the pipeline."""
    busy: bool = False
    """Whether a method runs, which may call others."""
    calls: list[tuple[CachedEncoder, dict[str, Any]]] | None = None
    """If a list, the pipeline's calls are added to it, with their arguments."""

    def run(self, method: Any, arguments: dict[str, Any]) -> Any:
        """Call an encoder method without gradient, and record which components it uses."""
        if self.gone:
            raise RecipeError(
                f"{type(self.pipe).__name__} can't encode {prompts_of(arguments)}: its text encoders have been let go"
                f"{f', and {self.folder.folder} holds no encoding of it' if self.folder else ''}. Encode all prompts "
                "before, or keep them with --train.keep-encoders."
            )
        owners = {
            id(part): name
            for name, component in self.pipe.components.items()
            if isinstance(component, nn.Module) and name not in UNUSED
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


class CachedEncoder:
    """Replacement of one `encode_...` method."""

    def __init__(self, state: EncoderState, method: Any) -> None:
        self.state, self.method = state, method
        self.signature = inspect.signature(method)
        self.layouts: dict[str, ResultLayout] = {}
        self.rows: dict[tuple[str, ...], list[Any]] = {}
        """Encodings in memory."""

    @property
    def name(self) -> str:
        """Pipeline and method."""
        return f"{type(self.state.pipe).__name__}.{self.method.__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the joined encodings; encode prompts that are new."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("kwargs", {})
        if isinstance(arguments.get("prompt"), str):
            arguments["prompt"] = [arguments["prompt"]]
        count = len(prompts_of(arguments))
        if self.state.busy or not count or any(isinstance(v, Tensor) for v in arguments.values()):
            return self.method(*args, **kwargs)
        if self.state.calls is not None:
            self.state.calls.append((self, arguments))
        kind, keys = self.keys(arguments)
        rows = {key: self._stored(kind, key) for key in dict.fromkeys(keys)}
        new = {key: keys.index(key) for key, row in rows.items() if row is None}
        if new:
            rows |= self._encode(kind, arguments, new)
        transformer = self.state.pipe.transformer
        joined = [row for key in keys if (row := rows[key]) is not None]
        return self.layouts[kind].joined(joined, transformer.device, transformer.dtype, self.name)

    def keys(self, arguments: Mapping[str, Any]) -> tuple[str, list[tuple[str, ...]]]:
        """Return what the prompts of a call share, and the key of each of them."""
        count = len(prompts_of(arguments))
        rest = {n: v for n, v in arguments.items() if n != "device" and not is_prompt_list(v, count)}
        kind = repr(sorted(rest.items(), key=lambda item: item[0]))
        lists = {n: v for n, v in arguments.items() if is_prompt_list(v, count)}
        first = (self.method.__name__, kind)
        return kind, [(*first, *(f"{n}={v[i]}" for n, v in lists.items())) for i in range(count)]

    def _stored(self, kind: str, key: tuple[str, ...]) -> list[Any] | None:
        """Return a prompt's leaves from memory or the folder, if they are in one."""
        if key in self.rows or self.state.folder is None:
            return self.rows.get(key)
        entry = self.state.folder.read(key, check=kind not in self.layouts)  # the layout decides over all others
        if entry is None:
            return None
        tensors, facts = entry
        if kind not in self.layouts:
            self.layouts[kind] = ResultLayout.unpacked(tensors, facts["layout"])
        self.state.encoders.update(facts["encoders"])
        return self.layouts[kind].unpacked_row(tensors)

    def _encode(
        self, kind: str, arguments: dict[str, Any], new: dict[tuple[str, ...], int]
    ) -> dict[tuple[str, ...], list[Any]]:
        """Encode the prompts at these places of a call, and store them.

        For a folder each prompt is encoded alone, so that an entry does not depend on the batch it was made in.
        """
        count, keys = len(prompts_of(arguments)), list(new)

        def made(places: list[int], added: str = "") -> Any:
            some = {
                n: [v[i] + added * (k > 0) for k, i in enumerate(places)] if is_prompt_list(v, count) else v
                for n, v in arguments.items()
            }
            return self.state.run(self.method, some)

        if kind not in self.layouts:
            first = new[keys[0]]
            self.layouts[kind] = ResultLayout.of(made([first]), made([first] * 2), self.name)
            if self.state.folder:  # a batch of one has no padding and no mask
                self.layouts[kind].note_masks(flat(made([first] * 2, _LONGER))[0])
        layout, rows = self.layouts[kind], dict[tuple[str, ...], list[Any]]()
        size = 1 if self.state.folder else len(keys)
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            leaves = flat(made([new[key] for key in part]))[0]
            layout.note_masks(leaves)
            for key, row in zip(part, layout.rows(leaves, len(part)), strict=True):
                rows[key] = row
                if not self._write(key, layout, row):
                    self.rows[key] = row
        return rows

    def _write(self, key: tuple[str, ...], layout: ResultLayout, row: list[Any]) -> bool:
        """Write an entry to the folder; return whether there is one and the entry has a place in it."""
        if self.state.folder is None or " at 0x" in key[1]:  # an address among the arguments
            return False
        packed = layout.packed(row)
        if packed is None:
            return False
        tensors, facts = packed
        self.state.folder.write(key, tensors, {"key": key, "layout": facts, "encoders": sorted(self.state.encoders)})
        return True


def is_prompt_list(value: Any, count: int) -> bool:
    """Whether this is a list of `count` strings."""
    return isinstance(value, list | tuple) and len(value) == count and all(isinstance(v, str) for v in value)


def prompts_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return the prompts of a call: its longest list of strings."""
    lists = [list(v) for v in arguments.values() if isinstance(v, list | tuple) and v and is_prompt_list(v, len(v))]
    return max(lists, key=len, default=[])
