"""The host does not wait for the device: no number is read off a tensor where a model call is made again."""

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
    """The places in the library that read a tensor's numbers, as they do."""
    found: list[str] = []

    def noted(own: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if "/trajsurgery/" in frame.f_code.co_filename:
                found.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            return own(*args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "equal", noted(torch.equal))
    return found


def test_a_pipeline_entered_again(waits: list[str]) -> None:
    """Each time of a rollout is compared with what was recorded once; the first step's latents each time."""
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


def test_the_linear_part_of_a_plan(waits: list[str]) -> None:
    """Recover asked whether the image's share is 0, which it can be at T alone."""
    w = torch.nn.Parameter(torch.tensor(0.5))
    plans = (leapalign(3, 1), Plan(latent(0).renoise(2).leap(1).recover()), Plan(latent(3).leap(1).recover("rollout")))
    trajectory = rollout(field := lambda x, sigma: w * x, torch.ones(2, 3), [1.0, 0.7, 0.4, 0.0])
    waits.clear()
    for plan in plans:
        backward(plan, trajectory, field, torch.ones(2, 3), check=False)
    assert not waits
    assert w.grad is not None
