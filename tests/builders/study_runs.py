"""Finished runs of a study with invented scores, for the tests of its tables."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from trajsurgery.evaluation.held_out import HeldOutScores
from trajsurgery.training.checkpoints.run_log import METRICS, Log

CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribute binding")


def invented(task: Any, gain: float, rules: float, seed: int) -> None:
    """Write a finished run: random rewards by seed, raised by `gain` over its stages; a share `rules` is correct."""
    g = torch.Generator().manual_seed(seed)
    reward, uniform, pictures = torch.rand(12, generator=g), torch.rand(12, generator=g), torch.rand(4, generator=g)
    task.folder.mkdir(parents=True)
    for stage in task.stages:
        risen = reward + gain * stage / 225
        scores = HeldOutScores(
            tuple(f"prompt {i}" for i in range(12)),
            CATEGORIES * 2,
            risen,
            uniform < rules,
            torch.zeros(12),
            (pictures.view(4, 1, 1, 1).expand(4, 3, 4, 4) * 255).to(torch.uint8),
            {"tiny:scorer_b": risen / 2, "tiny:scorer_c": risen * 2},
            {"pixels": torch.ones(12)},
        )
        torch.save(scores.to_dict(), task.folder / f"scores_{stage}.pt")
    log = Log(task.folder / METRICS)
    log.append(
        {"kind": "iteration", "reward": math.nan, "grad_norm": math.nan, "closed": 0.5, "weight": 1.0}
    )  # skipped
    for i in range(29):
        norm = 99.0 if i == 7 else 1.0
        log.append({"kind": "iteration", "reward": i + gain, "grad_norm": norm, "closed": 0.5, "weight": 1.0})
    record = {"recipe": task.recipe.to_dict(), "skipped": 1, "commit": "abc", "world": "def"}
    (task.folder / "done.json").write_text(json.dumps(record))
