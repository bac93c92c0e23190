"""The dry run's models at real size have the published parameters, and the costs measured once."""

from __future__ import annotations

import pytest
import torch

from trajsurgery.dry_run import find_spec
from trajsurgery.dry_run.fake_pipeline import build_model
from trajsurgery.dry_run.gpu_kernels import KERNELS
from trajsurgery.dry_run.model_costs import measure_model
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Rollout


@pytest.mark.parametrize(
    "model, parameters",
    [
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
        ("stabilityai/stable-diffusion-3.5-medium", 2_243_171_520),
        ("Qwen/Qwen-Image", 20_430_401_088),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800),
    ],
)
def test_shipped_configs_have_the_published_size(model: str, parameters: int) -> None:
    spec = find_spec(model)
    with torch.device("meta"):
        transformer = build_model(spec.transformer, torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == parameters == spec.published


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, size, parameters, saved, forward, backward",
    [
        ("black-forest-labs/FLUX.1-dev", 720, 11_901_408_320, 21.60, 37.28, 76.81),
        ("stabilityai/stable-diffusion-3.5-medium", 720, 2_243_171_520, 5.78, 4.84, 10.25),
    ],
)
def test_real_models(model: str, size: int, parameters: int, saved: float, forward: float, backward: float) -> None:
    """One velocity call in bfloat16, one image, without guidance, all norms as on a CPU."""
    rollout = Rollout(steps=25, precision="bfloat16", size=size, guidance=1.0)
    with KERNELS["cpu"]():
        costs = measure_model(Recipe(rollout=rollout, model=model), find_spec(model), 1, sharded=True)
    assert costs.model.count("transformer") == parameters == find_spec(model).published
    assert costs.call.kept / 2**30 == pytest.approx(saved, abs=0.01)
    assert costs.call.forward / 1e12 == pytest.approx(forward, abs=0.01)
    assert costs.call.backward / 1e12 == pytest.approx(backward, abs=0.01)
