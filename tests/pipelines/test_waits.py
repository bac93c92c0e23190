"""The host does not wait for the device: a replayed model call reads no number from a tensor."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.builders.pipelines.every import BUILDERS
from trajsurgery import Plan, backward, latent, leapalign, operate, rollout

READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of the library that read numbers from a tensor, recorded as they run."""
    lines: list[str] = []

    def recording(method: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if "/trajsurgery/" in frame.f_code.co_filename:
                lines.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            return method(*args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, recording(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "equal", recording(torch.equal))
    return lines


def test_a_replayed_call_reads_no_number(waits: list[str]) -> None:
    """The first replay at a time compares it with the record, later ones read nothing."""
    small = BUILDERS["Flux"]()
    with operate(small.pipe) as surgery:
        small()
    trajectory, field = surgery.trajectory, surgery.field
    field(trajectory[2], trajectory.sigma(2))
    assert waits
    waits.clear()
    x = torch.full_like(trajectory[2], 0.5)
    field(x, trajectory.sigma(2))
    assert not waits
    field(x, torch.tensor(float(trajectory.sigma(2))))  # a time that is not the trajectory's own tensor
    assert waits


def test_a_rollout_reads_its_sampler_s_times_once(waits: list[str]) -> None:
    """The scheduler makes them anew for each call of the pipeline; between calls nobody reads the last ones again."""
    small = BUILDERS["Flux"]()
    for _ in range(2):
        waits.clear()
        with operate(small.pipe, leapalign(4, 2), "split"):  # no leap is a step, which would be measured
            small()
    assert [line.partition(":")[0] for line in waits] == ["numbers"]


def test_backward_reads_no_number(waits: list[str]) -> None:
    """Recover read whether alpha_t is 0, which is possible at T only."""
    w = torch.nn.Parameter(torch.tensor(0.5))
    plans = (leapalign(3, 1), Plan(latent(0).renoise(2).leap(1).recover()), Plan(latent(3).leap(1).recover("rollout")))
    trajectory = rollout(field := lambda x, sigma: w * x, torch.ones(2, 3), [1.0, 0.7, 0.4, 0.0])
    waits.clear()
    for plan in plans:
        backward(plan, trajectory, field, torch.ones(2, 3), check=False)
    assert not waits
    assert w.grad is not None
