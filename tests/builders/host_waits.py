"""Counts how often the host would wait for the device, on a machine that has none."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item, bool, float, int, allclose
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
"""Operations whose result, or its shape, the host has to know: on CUDA it waits for the device there."""

COPIES = ("tolist", "numpy", "__array__", "cpu", "to")
"""Methods that hand a tensor's numbers to the host without such an operation."""


class HostWaits(TorchDispatchMode):
    """Record the lines that read a tensor of the device.

    Everything is on the CPU here, also what a GPU's run keeps there by design: generators' seeds, drawn times, prompts.
    So the device's tensors are told apart by where they come from: those in `sources`, what the functions wrapped by
    `moving` return (the pipeline's noise and its sampler's times, which it makes on the CPU and moves), and whatever is
    computed from any of them. `.to` counts where the host is named, `.to("cpu")`.
    """

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.storages: set[int] = set()
        self.put(list(sources))

    def put(self, values: Any) -> None:
        """From now on these tensors lie on the device."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in self.storages:
                self.storages.add(key)
                finalize(value.untyped_storage(), self.storages.discard, key)

    def has(self, values: Any) -> bool:
        """Whether one of these tensors lies on the device."""
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        return any(tensor.untyped_storage()._cdata in self.storages for tensor in tensors)

    def moving(self, function: Callable[..., Any], owner: Any = None) -> Callable[..., Any]:
        """Wrap a function: what it returns, or sets on its owner, lies on the device."""

        @functools.wraps(function)
        def moved(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.put((result, list(vars(owner).values()) if owner is not None else ()))
            return result

        return moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = self.has((args, kwargs))
        masks = [a for a in tree_leaves(args) if isinstance(a, Tensor) and a.dtype == torch.bool]
        if on_device and (func in READS or (func is aten.index.Tensor and self.has(masks))):
            self.note(str(func))
        result = func(*args, **(kwargs or {}))
        if on_device:
            self.put(result)
        return result

    def note(self, what: str) -> None:
        """Record the innermost line of the library, or of a package it uses, that reads."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and not any(
            part in frame.f_code.co_filename for part in ("/trajsurgery/", "/diffusers/")
        ):
            frame = frame.f_back
        place = "?" if frame is None else f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        self.lines.append(f"{what} in {place}")

    def __enter__(self) -> HostWaits:
        self.methods = {name: getattr(Tensor, name) for name in COPIES}
        for name, method in self.methods.items():
            setattr(Tensor, name, self.recording(name, method))
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for name, method in self.methods.items():
            setattr(Tensor, name, method)

    def recording(self, name: str, method: Any) -> Any:
        """Wrap a method of tensors that reads."""

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if (name != "to" or "cpu" in [a for a in (*args, *kwargs.values()) if isinstance(a, str)]) and self.has(
                tensor
            ):
                self.note(name)
            return method(tensor, *args, **kwargs)

        return read
