"""The gradient alarm: which parameters were to train and got nothing, and what that may mean."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

SHOWN = 8
"""So many names are written out on the console."""


def idle(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the parameters that require a gradient and whose `.grad` is None or all zeros.

    Waits for the device, once.

    Args:
        named: as `module.named_parameters()`, after a backward pass and before `zero_grad`.
    """
    trained = [(name, p) for name, p in named if p.requires_grad]
    given = [(name, p.grad) for name, p in trained if p.grad is not None]
    if not given:
        return [name for name, _ in trained]
    device = given[0][1].device
    moved: list[bool] = torch.stack([grad.any().to(device) for _, grad in given]).tolist()
    busy = {name for (name, _), some in zip(given, moved, strict=True) if some}
    return [name for name, _ in trained if name not in busy]


def warning(names: Sequence[str], count: int) -> str:
    """What is said of `idle`'s names, of so many parameters that train. LoRA's A matrices have a sentence of their own.

    LoRA starts with B = 0, and then the gradient of A is exactly zero until B's first step.
    """
    waiting = [name for name in names if "lora_A" in name]
    others = [name for name in names if "lora_A" not in name]
    said = f"{len(names)} of {count} parameters that train got no gradient (None, or zeros)"
    if others:
        rest = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        said += (
            f": {', '.join(others[:SHOWN])}{rest}. That is right for weights that the output does not depend on (SD3's "
            "last block discards its text); else something between them and the reward detaches."
        )
    if waiting:
        also = "; among them" if not others else " Also"
        said += (
            f"{also} {len(waiting)} A matrices of LoRA: right in the first iteration if their B starts at zero, and "
            "wrong if it does not. Nothing looks at them again: call training.missing_gradients.idle after a later one."
        )
    return said


@contextmanager
def untouched_is_none(parameters: Sequence[Tensor]) -> Generator[None]:
    """After the block a `.grad` that was there before and that nothing was added to is None, as if it had not been.

    The staged sweep adds into gradients that were set to zero; a parameter that it does not reach would keep zeros,
    which an optimiser decays and counts, where other ways of running leave None. Never waits for the device: what is
    compared is how often a tensor was changed.
    """
    before = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p in parameters]
    yield
    for p, grad, version in before:
        if grad is not None and p.grad is grad and grad._version == version:
            p.grad = None
