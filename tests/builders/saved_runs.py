"""What a run left in its folder, for comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trajsurgery.training.checkpoints.checkpoint import list_checkpoints, saved_tensors
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.tensor_folder import read_state

NOT_REPEATED = ("seconds", "parts", "memory")
"""What of a line of metrics.jsonl differs when a run is repeated."""


def repeated(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of a log is the same when a run is repeated."""
    return [{name: value for name, value in line.items() if name not in NOT_REPEATED} for line in lines]


def load_checkpoint(output: Path) -> dict[str, Any]:
    """The newest checkpoint: weights, averages and optimiser by the parameters' names, and its counters."""
    groups = {group: saved_tensors(output, group) for group in ("weights", "averages", "optimiser")}
    return {**groups, **read_state(list_checkpoints(output)[0])}


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a nested state, in order."""
    if hasattr(state, "codes"):  # torchao's moments of 8 bits
        return [state.codes, state.scale]
    if isinstance(state, Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in inner for tensor in tensors(value)]


def equal_with_nan(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal bit for bit, NaN equal to NaN (diversity of the only image of a prompt)."""
    return torch.equal(a, b) if not a.is_floating_point() else torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that two runs ended alike: weights, averages, optimiser, counters, and the log except its times."""
    first, second = load_checkpoint(a), load_checkpoint(b)
    for name in ("weights", "averages", "optimiser", "before"):
        assert tensors(first[name])
        assert all(map(equal_with_nan, tensors(first[name]), tensors(second[name]))), name
    for name in ("iteration", "skipped", "in_a_row", "looked", "ema", "early_stopping"):
        assert first[name] == second[name], name
    logs = [repeated(Log(folder / METRICS).read()) for folder in (a, b)]
    assert logs[0] == logs[1]
