"""Processes forked from a server that has imported the library: a rank, or a run, starts in a second."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.builders.toy_world", "trajsurgery.cli.train_command"])


def spawn_ranks(work: Callable[..., Any], args: tuple[Any, ...], count: int) -> None:
    """Run `work(rank, *args)` in `count` processes; raise what one of them raises."""
    torch.multiprocessing.start_processes(work, args, count, start_method="forkserver")  # type: ignore[attr-defined]
