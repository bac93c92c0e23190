"""What a piece of work keeps for its backward pass, holds at its peak, and computes; on fake tensors or real ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

Work = Callable[[], Iterable[Tensor]]
"""Computes something that requires a gradient."""


@dataclass(frozen=True)
class Measured:
    """One piece of work, forward and backward."""

    kept: int
    """Bytes that autograd holds after it, the parameters left out, storages counted once."""
    further: int
    """Bytes that the same work adds when it is done once more in the same graph."""
    peak: int
    """The most bytes alive in its forward and backward pass beside what was there, `.grad` included."""
    forward: int
    """Floating point operations: two for a multiplication and an addition."""
    backward: int
    """The same, with what checkpointing computes again."""
    chained: int
    """Those of the backward pass that reaches the work's input as well."""


class Alive(TorchDispatchMode):
    """The most bytes alive at once of the storages that are made under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, int] = {}
        self.now = self.most = 0

    def _free(self, name: int) -> None:
        self.now -= self._held.pop(name, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = [v for v in tree_leaves(found) if isinstance(v, Tensor)]
        given: set[int] | None = None
        for value in made:
            storage: Any = value.untyped_storage()
            if storage._cdata in self._held:
                continue
            if given is None:
                given = {_name(v) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
            if storage._cdata not in given:
                self._held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.most = max(self.most, self.now)
        return found


def _name(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def kept(work: Callable[[], Any], parameters: Iterable[Tensor]) -> tuple[int, Any]:
    """The bytes that autograd saved in `work` and holds at its end, and what it returned."""
    own, held = {_name(p) for p in parameters}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage: Any = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in held:
            held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, held.pop, storage._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = work()
    return sum(held.values()), found


def counter() -> FlopCounterMode:
    """torch's own counter, which counts the CPU's flash attention too (left alone it takes that for nothing)."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
        return sdpa_backward_flop(grad, query, key, value)

    mapping: Any = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def measure(work: Work, parameters: Iterable[Tensor], again: Work | None = None) -> Measured:
    """Runs the work up to six times, thrice with its backward pass. Gradients are added into `.grad`, which is made.

    Args:
        again: the same work with a gradient to its input, if there is such a one.
    """
    parameters = list(parameters)
    one, first = kept(work, parameters)
    del first
    both, twice = kept(lambda: (work(), (again or work)()), parameters)
    del twice
    for p in parameters:
        if p.requires_grad and p.grad is None:
            p.grad = torch.empty_like(p)
    with counter() as forward:
        outputs = list(work())
    backward = _backward(outputs)
    del outputs
    chained = _backward(list(again())) if again else backward
    with Alive() as alive:  # alone: the counter's hooks hold what it has seen
        outputs = list(work())
        torch.autograd.backward(outputs, [torch.empty_like(v) for v in outputs])
    return Measured(one, both - one, alive.most, forward.get_total_flops(), backward, chained)


def _backward(outputs: list[Tensor]) -> int:
    """The operations of a backward pass."""
    with counter() as flops:
        torch.autograd.backward(outputs, [torch.empty_like(v) for v in outputs])
    return flops.get_total_flops()
