"""Out of memory: in which part of a run, and how much was in use."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from trajsurgery.errors import OutOfMemoryError

_MESSAGES = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", flags=re.IGNORECASE)
"""What torch's CPU allocator and CUDA's libraries say, whose errors have no type of their own."""


@contextmanager
def memory_of(part: str) -> Generator[None]:
    """Raise `OutOfMemoryError` with the name of the part for whatever an allocator raises in it.

    Args:
        part: of a run, such as "the rollout". Of nested parts the inner one is named.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise OutOfMemoryError(f"out of memory in {part}: {_in_use()}. The allocator: {reason}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised an error, on a GPU or the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_MESSAGES.search(str(error)))


def _in_use() -> str:
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        used = f"{_gib(total - free)} of the GPU's {_gib(total)} were in use"
        return f"{used}, {_gib(torch.cuda.max_memory_allocated())} by this process's tensors at their peak"
    status = Path("/proc/self/status")
    lines = (
        dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        if status.exists()
        else {}
    )
    kilobytes = re.match(r"\s*(\d+) kB", lines.get("VmRSS", ""))
    return f"this process used {_gib(int(kilobytes[1]) * 1024)} of the machine's memory" if kilobytes else "on the CPU"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
