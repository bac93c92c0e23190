"""What the training command computes with names its device: bookkeeping on the CPU is the only exception."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from trajsurgery import LeapAlign, RecipeError
from trajsurgery.cli import train_command
from trajsurgery.training.distributed import ranks
from trajsurgery.training.presets import presets
from trajsurgery.training.settings import Guards

ROOT = Path(train_command.__file__).parents[1]
ON_THE_CPU = {
    "evaluation/calibration.py",
    "evaluation/diversity.py",
    "evaluation/paired_statistics.py",
    "methods/draws.py",
    "pipelines/replay.py",  # as_tensor of a recorded timestep
    "tiny/prompt.py",
    "tiny/rules.py",
    "tiny/sd3.py",
    "tiny/segment.py",
    "tiny/video_rules.py",
}
"""Files that work on what was moved to the CPU: statistics, draws, the rules of the embedded world, its loading."""


class TensorsWithoutDevice(TorchFunctionMode):
    """Collects the files of the library that make a tensor without a device or a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.files: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        settings = kwargs or {}
        file = Path(sys._getframe(1).f_code.co_filename)
        named = settings.get("device") is not None or settings.get("generator") is not None
        if func in _device_constructors() and not named and file.is_relative_to(ROOT):
            self.files.add(file.relative_to(ROOT).as_posix())
        return func(*args, **settings)


@pytest.mark.parametrize("model", ["tiny", "tiny:sd3"])
def test_a_run_makes_no_tensor_that_may_lie_on_another_device(model: str, tmp_path: Path) -> None:
    recipe = presets(LeapAlign(), str(tmp_path))["tiny"]
    short = replace(
        recipe,
        model=model,
        device="cpu",
        iterations=2,
        rollout=replace(recipe.rollout, steps=5, batch=4),
        evaluation=replace(recipe.evaluation, images=6, steps=5, batch=6, pictures=2),
        guards=Guards(every=1, images=6, patience=3, anchor=0.1),
        output=tmp_path / "run",
    )
    with TensorsWithoutDevice() as made:
        assert train_command.main(short) is not None
    assert "tiny/segment.py" in made.files
    assert made.files <= ON_THE_CPU


def test_a_device_that_is_not_there_is_refused() -> None:
    assert ranks.choose_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu", "meta"):
        with pytest.raises(RecipeError, match=f"--device {name}"):
            ranks.choose_device(name)
