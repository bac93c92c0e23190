"""Bytes that a piece of work keeps and needs at its peak, and its operations, on fake or real tensors."""

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
class MeasuredWork:
    """Costs of one piece of work, forward and backward."""

    kept: int
    """Bytes that autograd holds after it without the parameters; each storage counts once."""
    further: int
    """Bytes that the same work adds when done once more in the same graph."""
    peak: int
    """The most bytes alive in its forward and backward pass beside what existed, `.grad` included."""
    forward: int
    """Floating point operations: two for a multiplication and an addition."""
    backward: int
    """The same, with what checkpointing computes again."""
    chained: int
    """Those of a backward pass that also reaches the work's input."""


class PeakMemory(TorchDispatchMode):
    """The most bytes alive at once of the storages made under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, int] = {}
        self.now = self.most = 0

    def _free(self, name: int) -> None:
        self.now -= self._held.pop(name, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [v for v in tree_leaves(result) if isinstance(v, Tensor)]
        input_storages: set[int] | None = None
        for value in made:
            storage: Any = value.untyped_storage()
            if storage._cdata in self._held:
                continue
            if input_storages is None:
                input_storages = {_name(v) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
            if storage._cdata not in input_storages:
                self._held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.most = max(self.most, self.now)
        return result


def _name(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def kept_bytes(work: Callable[[], Any], parameters: Iterable[Tensor]) -> tuple[int, Any]:
    """Return the bytes that autograd saved in `work` and holds at its end, and its result."""
    parameter_storages, held = {_name(p) for p in parameters}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage: Any = tensor.untyped_storage()
        if storage._cdata not in parameter_storages and storage._cdata not in held:
            held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, held.pop, storage._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return sum(held.values()), result


def flop_counter() -> FlopCounterMode:
    """Return torch's operation counter, extended to count the CPU's flash attention."""
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


def measure(work: Work, parameters: Iterable[Tensor], again: Work | None = None) -> MeasuredWork:
    """Run the work up to six times, three times with its backward pass. Gradients are created and added into `.grad`.

    Args:
        again: the same work with a gradient to its input, if there is such.
    """
    parameters = list(parameters)
    one, first = kept_bytes(work, parameters)
    del first
    both, twice = kept_bytes(lambda: (work(), (again or work)()), parameters)
    del twice
    for p in parameters:
        if p.requires_grad and p.grad is None:
            p.grad = torch.empty_like(p)
    with flop_counter() as forward:
        outputs = list(work())
    backward = _backward(outputs)
    del outputs
    chained = _backward(list(again())) if again else backward
    with PeakMemory() as alive:  # alone: the counter's hooks hold what it has seen
        outputs = list(work())
        torch.autograd.backward(outputs, [torch.empty_like(v) for v in outputs])
    return MeasuredWork(one, both - one, alive.most, forward.get_total_flops(), backward, chained)


def _backward(outputs: list[Tensor]) -> int:
    """The operations of a backward pass."""
    with flop_counter() as flops:
        torch.autograd.backward(outputs, [torch.empty_like(v) for v in outputs])
    return flops.get_total_flops()
