"""Find parameters that should train and got no gradient, and explain what that may mean."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trajsurgery.training.distributed import ranks, sharding

SHOWN = 8
"""The most names that a warning lists."""


def without_gradient(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the trained parameters whose `.grad` is None or all zeros.

    Waits for the device once. All ranks call this together.

    Args:
        named: `module.named_parameters()`, after a backward pass and before `zero_grad`.
    """
    trained = [(name, p) for name, p in named if p.requires_grad]
    gradients = [(name, sharding.local(p.grad)) for name, p in trained if p.grad is not None]
    if not gradients:
        return [name for name, _ in trained]
    device = gradients[0][1].device
    nonzero: list[bool] = ranks.anywhere(torch.stack([grad.any().to(device) for _, grad in gradients])).tolist()
    reached = {name for (name, _), any_nonzero in zip(gradients, nonzero, strict=True) if any_nonzero}
    return [name for name, _ in trained if name not in reached]


def warning(names: Sequence[str], count: int) -> str:
    """Return the warning for `names`, out of `count` parameters that train.

    LoRA starts with B = 0, so the gradient of A is zero until the first step: A matrices get a sentence of their own.
    """
    waiting = [name for name in names if "lora_A" in name]
    others = [name for name in names if "lora_A" not in name]
    message = f"{len(names)} of {count} parameters that train got no gradient (None, or zeros)"
    if others:
        rest = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        message += (
            f": {', '.join(others[:SHOWN])}{rest}. That is right for weights that the output does not depend on (SD3's "
            "last block discards its text); else something between them and the reward detaches."
        )
    if waiting:
        also = "; among them" if not others else " Also"
        message += (
            f"{also} {len(waiting)} A matrices of LoRA: right in the first iteration if their B starts at zero, and "
            "wrong if it does not. Nothing looks at them again: call missing_gradients.without_gradient later on."
        )
    return message


@contextmanager
def clear_untouched_gradients(parameters: Sequence[Tensor]) -> Generator[None]:
    """On exit, set `.grad` to None where it existed before and nothing was added to it.

    The staged sweep adds into zeroed gradients. A parameter that it does not reach would keep zeros, which an optimizer
    decays and counts; in the other ways of running it has None. This compares version counters and never waits for the
    device.
    """
    before = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p in parameters]
    yield
    for p, grad, version in before:
        if grad is not None and p.grad is grad and grad._version == version:
            p.grad = None
