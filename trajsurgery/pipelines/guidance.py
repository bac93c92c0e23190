"""Classifier-free guidance: which of its two passes keep their gradient.

With v = u + s (c - u) the gradient goes to both passes: s to the conditional one, 1 - s (of the other sign) to the
unconditional one. "conditional" keeps the first alone, s dc/dtheta. Values are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trajsurgery.errors import SurgeryError
from trajsurgery.surgery import autograd_functions

GuidanceGradient = Literal["both", "conditional"]


def check_guidance_gradient(name: str) -> None:
    """Raise SurgeryError for an unknown choice."""
    if name not in ("both", "conditional"):
        raise SurgeryError(f'guidance_gradient={name!r}: it is "both" or "conditional".')


class GuidancePasses:
    """The outputs of the modules called in one step, sorted into passes by how the velocity depends on them.

    A pass is a row of a call's batch. Rows that enter the velocity with the sign of the whole are conditional, those
    with the other sign unconditional, whatever the order, number and batching of the calls. With a guidance scale of at
    most 1 there is no other sign, and nothing is cut.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._noted: list[tuple[Tensor, autograd_functions.Gate]] = []
        self._of: set[nn.Module] = set()
        self._handles = [module.register_forward_hook(self._note) for module in modules]

    def _note(self, module: nn.Module, _: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        self._of.add(module)
        return tree_map(self._gated, output)

    def _gated(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        gate = autograd_functions.Gate()
        self._noted.append((passed := autograd_functions.gated(value, gate), gate))
        return passed

    def tell(self, v: Tensor) -> None:
        """Close the gates of the unconditional rows, once the velocity is known."""
        noted, of = self._noted, {type(module).__name__ for module in self._of}
        self._noted, self._of = [], set()
        if not noted or not v.requires_grad:
            return
        if len(of) > 1:
            names = ", ".join(sorted(of))
            raise SurgeryError(
                f'guidance_gradient="conditional" on a step that calls {names} with gradient: the two sides of '
                'guidance are told apart for one model. Pass guidance_gradient="both".'
            )
        outputs = [output for output, _ in noted]
        shares: Any = torch.autograd.grad(v, outputs, torch.ones_like(v), retain_graph=True, allow_unused=True)
        # in float32 at least: the sum over a large float16 output overflows
        rows = [None if s is None else s.reshape(len(s), -1).sum(1, dtype=_wide(s)) for s in shares]
        whole = torch.stack([row.sum() for row in rows if row is not None]).sum()
        for row, (_, gate) in zip(rows, noted, strict=True):
            if row is not None:
                gate.rows = row * whole > 0

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
