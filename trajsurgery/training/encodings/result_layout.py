"""How a pipeline's encoding of several prompts is split into single prompts, and joined from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from trajsurgery.errors import RecipeError


@dataclass(frozen=True, eq=False)
class ResultLayout:
    """How the result for several prompts is joined from results for single ones."""

    tree: TreeSpec
    dims: tuple[int | None, ...]
    """For each leaf, the dimension that counts prompts; -1: a list with one entry each; None: the same for all."""
    same: list[Any]
    """The leaves that are the same for all prompts; None for the others."""
    on_cpu: tuple[bool, ...]
    """Leaves that the pipeline leaves on the CPU."""
    masks: set[int] = field(default_factory=set[int])
    """Leaves that are masks [prompts, tokens], or None where no prompt is padded."""

    @classmethod
    def of(cls, alone: Any, twice: Any, name: str) -> ResultLayout:
        """Return the layout, from the results for one prompt and for it twice.

        Args:
            name: of the method, for errors.
        """
        (leaves, tree), (doubled, _) = flat(alone), flat(twice)
        dims = tuple(_dimension(a, b, name) for a, b in zip(leaves, doubled, strict=True))
        same = [leaf if dim is None else None for leaf, dim in zip(leaves, dims, strict=True)]
        firsts = [leaf[0] if isinstance(leaf, list) and leaf else leaf for leaf in leaves]
        on_cpu = tuple(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in firsts)
        return cls(tree, dims, same, on_cpu)

    def note_masks(self, leaves: list[Any]) -> None:
        """Record which leaves are masks, from the result for prompts of several lengths."""
        for i, (leaf, dim, alone) in enumerate(zip(leaves, self.dims, self.same, strict=True)):
            if dim is None and alone is None and isinstance(leaf, Tensor):
                self.masks.add(i)

    def rows(self, leaves: list[Any], count: int) -> list[list[Any]]:
        """Return the leaves of each of `count` prompts, on the CPU."""
        pairs = list(zip(leaves, self.dims, strict=True))
        return [[_row(leaf, dim, place, count) for leaf, dim in pairs] for place in range(count)]

    def joined(self, rows: Sequence[list[Any]], device: torch.device, dtype: torch.dtype, name: str) -> Any:
        """Return the result for these prompts, in new memory.

        Args:
            device: for leaves that the pipeline does not leave on the CPU.
            dtype: of floating-point leaves.
            name: of the method, for errors.
        """
        places = [torch.device("cpu") if cpu else device for cpu in self.on_cpu]
        leaves: list[Any] = []
        for i, dim in enumerate(self.dims):
            parts, place = [row[i] for row in rows], places[i]
            if i in self.masks:
                states = next(j for j, leaf in enumerate(rows[0]) if _is_token_states(leaf))
                parts, dim, place = [_mask(row, i, states) for row in rows], 0, places[states]
            if dim == -1:
                leaves.append([_moved(v, place, dtype, copy=True) for part in parts for v in part])
            elif dim is None:
                leaves.append(_moved(self.same[i], place, dtype, copy=True))
            else:
                padded = self._padded(parts, dim, [*rows[0], *self.same], name)
                leaves.append(_moved(torch.cat(padded, dim), place, dtype, copy=False))
        return tree_unflatten(leaves, self.tree)

    def _padded(self, parts: list[Tensor], dim: int, leaves: list[Any], name: str) -> list[Tensor]:
        """Pad shorter encodings with zeros, which their masks exclude."""
        longest = [max(sizes) for sizes in zip(*(part.shape for part in parts))]
        longest[dim] = parts[0].shape[dim]
        if all(list(part.shape) == longest for part in parts):
            return parts
        if not self.masks and not any(isinstance(v, Tensor) and not v.is_floating_point() for v in leaves):
            raise RecipeError(
                f"{name} encodes prompts to the length of the longest of a batch and gives no mask with them: those of "
                "several batches can't be joined."
            )
        gaps = [[most - size for size, most in zip(part.shape, longest)] for part in parts]
        return [nn.functional.pad(v, [w for n in gap[::-1] for w in (0, n)]) for v, gap in zip(parts, gaps)]

    def packed(self, row: list[Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return a prompt's leaves and this layout, as tensors by name and a dict for JSON.

        None if they hold something that is neither a tensor nor a plain value.
        """
        tensors = {f"same {i}": leaf.cpu() for i, leaf in enumerate(self.same) if isinstance(leaf, Tensor)}
        for i, leaf in enumerate(row):
            named: Any = enumerate(leaf) if isinstance(leaf, list) else [("", leaf)] if leaf is not None else []
            tensors |= {f"{i} {j}".strip(): value for j, value in named}
        plain = str | int | float | bool | Tensor | None
        if not all(isinstance(v, plain) for v in self.same) or any(type(v) is not Tensor for v in tensors.values()):
            return None
        layout = {
            "tree": treespec_dumps(self.tree),
            "dims": self.dims,
            "same": [None if isinstance(leaf, Tensor) else leaf for leaf in self.same],
            "on_cpu": self.on_cpu,
            "masks": sorted(self.masks),
        }
        return tensors, layout

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], layout: dict[str, Any]) -> ResultLayout:
        """Return the layout that `packed` wrote."""
        same = [tensors[f"same {i}"].clone() if f"same {i}" in tensors else v for i, v in enumerate(layout["same"])]
        tree, masks = treespec_loads(layout["tree"]), set[int](layout["masks"])
        return cls(tree, tuple(layout["dims"]), same, tuple(layout["on_cpu"]), masks)

    def unpacked_row(self, tensors: dict[str, Tensor]) -> list[Any]:
        """Return the prompt's leaves that `packed` wrote."""
        sizes = [sum(name.startswith(f"{i} ") for name in tensors) for i in range(len(self.dims))]
        return [
            [tensors[f"{i} {j}"] for j in range(sizes[i])] if dim == -1 else tensors.get(str(i))
            for i, dim in enumerate(self.dims)
        ]


def flat(result: Any) -> tuple[list[Any], TreeSpec]:
    """Return the leaves of a result, lists among them, and its structure."""
    return tree_flatten(result, is_leaf=lambda v: isinstance(v, list))


def _dimension(alone: Any, twice: Any, name: str) -> int | None:
    if isinstance(alone, list):
        return -1
    if not isinstance(alone, Tensor) or alone.shape == twice.shape:
        return None
    for dim in range(alone.dim()):
        if twice.shape == (*alone.shape[:dim], 2 * alone.shape[dim], *alone.shape[dim + 1 :]):
            return dim
    raise RecipeError(
        f"{name} returned {tuple(alone.shape)} for one prompt and {tuple(twice.shape)} for it twice: no dimension "
        "counts prompts, so that they can't be encoded ahead."
    )


def _is_token_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2


def _mask(row: list[Any], i: int, states: int) -> Tensor:
    """Return a prompt's mask [1, tokens]; all tokens if it was encoded without one."""
    return row[i] if row[i] is not None else torch.ones(row[states].shape[:2], dtype=torch.long)


def _row(leaf: Any, dim: int | None, place: int, count: int) -> Any:
    """Return one prompt's part of a leaf, on the CPU."""
    if dim is None:  # a mask, or the same for all
        return leaf[place : place + 1].cpu() if isinstance(leaf, Tensor) and len(leaf) == count else None
    if dim == -1:
        size = len(leaf) // count
        return [v.cpu() if isinstance(v, Tensor) else v for v in leaf[place * size : (place + 1) * size]]
    size = leaf.shape[dim] // count
    return leaf.narrow(dim, place * size, size).cpu()


def _moved(value: Any, device: torch.device, dtype: torch.dtype, copy: bool) -> Any:
    """Return a leaf on a device; floating-point numbers get a dtype."""
    if not isinstance(value, Tensor):
        return value
    dtype = dtype if value.is_floating_point() else value.dtype
    return value.to(device, dtype, copy=copy, non_blocking=device.type != "cpu")
