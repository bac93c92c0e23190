"""Training keeps those latents and velocities of a rollout that its plans read, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import toy_world
from trajsurgery import DRaFTLV, DRTune, FlowBPLagrange, LeapAlign, SamplerError, leapalign, operate
from trajsurgery.pipelines.denoising_loop import DenoisingLoop
from trajsurgery.training import training_loop
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.settings import Guards

WAYS: dict[str, tuple[Method, dict[str, Any]]] = {
    "split": (LeapAlign(), {}),
    "staged": (LeapAlign(), {"memory": "staged"}),
    "retain, several plans": (LeapAlign(), {"memory": "retain", "plans": 2}),
    "per sample": (LeapAlign(), {"times": "per-sample"}),
    "leaps end early": (DRTune(last=3), {}),
    "renoised": (DRaFTLV(), {"memory": "staged"}),
    "recorded velocities": (FlowBPLagrange(), {"memory": "recompute"}),
}


def train(settings: Recipe, counts: list[int]) -> tuple[list[Tensor], list[Any]]:
    """Parameters and figures of two iterations; `counts` gets how many latents each rollout kept."""
    world = toy_world.world(settings)
    training, embeddings = TrainingState.start(settings, world.module), PromptCache(world.pipe, world.texts)
    exit_loop = DenoisingLoop.__exit__

    def counting(loop: DenoisingLoop, *error: Any) -> None:
        exit_loop(loop, *error)
        counts.append(len(loop.trajectory.latents) + len(loop.trajectory.velocities))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoisingLoop, "__exit__", counting)
        records = [training_loop.training_step(settings, world, embeddings, training, 0.9) for _ in range(2)]
    same = [replace(record, seconds=0, parts={}, memory=0) for record in records]
    return [p.detach().clone() for p in training.parameters], same


@pytest.mark.parametrize("way", WAYS)
def test_what_is_dropped_changes_no_bit(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, rollout = WAYS[way]
    settings = toy_world.recipe(tmp_path, method)
    settings = replace(settings, rollout=replace(settings.rollout, steps=8, **rollout))
    few, many = list[int](), list[int]()
    parameters, figures = train(settings, few)
    monkeypatch.setattr(training_loop, "times_of_plans", lambda _: None)
    expected, expected_figures = train(settings, many)
    assert figures == expected_figures
    assert all(map(torch.equal, parameters, expected))
    assert many == [17, 17]
    assert min(few) < 17


def test_an_anchor_s_time_is_kept(tmp_path: Path) -> None:
    """It may be any: all are."""
    counts = list[int]()
    train(toy_world.recipe(tmp_path, guards=Guards(anchor=0.1)), counts)
    assert counts == [11, 11]


def test_operate_keeps_what_is_named() -> None:
    pipe, plan, steps = toy_world.pipeline(), leapalign(5, 2), 6
    pipe.set_progress_bar_config(disable=True)
    runs = list[Any]()
    for keep in ((4,), None):
        with operate(pipe, plan, "split", keep=keep) as surgery:
            generator = torch.Generator().manual_seed(0)
            pipe("a circle", num_inference_steps=steps, height=16, width=16, generator=generator, output_type="latent")
        runs.append(surgery)
    kept, whole = (run.trajectory for run in runs)
    assert list(kept.latents) == [6, 5, 4, 2, 0]
    assert list(kept.velocities) == [6, 5, 4, 2]
    assert kept.sums.keys() == {3, 1}
    assert all(torch.equal(kept[t], whole[t]) for t in kept.latents)
    assert all(torch.equal(kept.sums[t], whole.velocity(t).flatten(1).sum(1)) for t in kept.sums)
    assert torch.equal(runs[0].outputs[0], runs[1].outputs[0])
    assert all(torch.equal(d, runs[1].distances[t]) for t, d in runs[0].distances.items())
    with pytest.raises(SamplerError, match="holds no x_3"):
        kept[3]
