"""Seconds of the parts of an iteration, and memory: what a record says of them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from trajsurgery.training.faults.memory_errors import memory_of


class PartTimes:
    """Adds up the seconds of parts, by name: by the clock of the device, without waiting for it, or by the host's."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        """Return the time now: an event in the device's queue, or seconds."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Any, end: Any) -> None:
        """Count what lies between two marks."""
        if self._on_gpu:
            self._events.append((name, start, end))
        else:
            self.seconds[name] = self.seconds.get(name, 0.0) + end - start

    def read_device(self) -> None:
        """Read the device's clock. Call it when the device has done everything; from now on the host's clock counts."""
        for name, start, end in self._events:
            self.seconds[name] = self.seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        self._events.clear()
        self._on_gpu = False


_CURRENT: ContextVar[PartTimes | None] = ContextVar("part_times", default=None)


@contextmanager
def part_times(device: torch.device) -> Generator[PartTimes]:
    """Collect the seconds of each `part` in the block."""
    times = PartTimes(device)
    token = _CURRENT.set(times)
    try:
        yield times
    finally:
        _CURRENT.reset(token)


@contextmanager
def part(name: str) -> Generator[None]:
    """A part of an iteration, such as "the rollout": timed, and named if memory runs out in it.

    Raises:
        OutOfMemoryError: see `memory_of`.
    """
    times = _CURRENT.get()
    start = times.mark() if times else None
    with memory_of(name):
        yield
    if times:
        times.add(name, start, times.mark())


def peak_memory(device: torch.device) -> float:
    """Return GiB at the peak so far: of this process's tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
