"""Checks of numbers that lie on the device: made at once, or gathered for one read by the host.

A check that reads a number makes the host wait for all of the device's work before it. A training iteration defers its
checks: their flags are computed on the device and come to the host with the iteration's figures.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from trajsurgery.errors import SurgeryError


class DeferredChecks:
    """The checks that were made in a `deferred_checks` block."""

    def __init__(self) -> None:
        self.held: list[tuple[Tensor, Callable[[], SurgeryError]]] = []
        """Each check's flag, 0-dim, and what makes its error."""

    def flags(self, like: Tensor) -> Tensor:
        """Return 1 for each check that has passed and 0 for others, [checks], on the device and in the dtype of `like`.

        Does not wait for the device.
        """
        return torch.stack([passed.to(like) for passed, _ in self.held]) if self.held else like.new_empty(0)

    def raise_failed(self, flags: Sequence[float]) -> None:
        """Raise the error of the first check that failed, given the numbers of `flags`."""
        for flag, (_, error) in zip(flags, self.held, strict=True):
            if not flag:
                raise error()


_OPEN: ContextVar[DeferredChecks | None] = ContextVar("deferred checks", default=None)


@contextmanager
def deferred_checks() -> Generator[DeferredChecks]:
    """Inside the block `require` gathers checks; the caller reads their flags and calls `raise_failed`.

    If the block raises, a failed check comes first: what it let through may be the reason.
    """
    checks = DeferredChecks()
    token = _OPEN.set(checks)
    try:
        yield checks
    except SurgeryError:
        checks.raise_failed([bool(passed) for passed, _ in checks.held])
        raise
    finally:
        _OPEN.reset(token)


def are_deferred() -> bool:
    """Whether a `deferred_checks` block is open."""
    return _OPEN.get() is not None


def require(passed: Tensor, error: Callable[[], SurgeryError]) -> None:
    """Raise an error unless a check passed: now, which waits for the device, or at the end of `deferred_checks`.

    Args:
        passed: 0-dim.
        error: makes the error; it may wait for the device.
    """
    checks = _OPEN.get()
    if checks is not None:
        checks.held.append((passed.detach(), error))
    elif not bool(passed):
        raise error()
