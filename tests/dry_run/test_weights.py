"""Bytes that stay are those of the tensors of a run: weights, gradients, moments, averages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders.small_pipelines import PIPELINES
from tests.dry_run.test_memory import PLAN, recipe, small
from trajsurgery import plan_memory
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import prepare_pipeline
from trajsurgery.training.settings import Optimiser, Trained

CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, averages on the CPU": {"ema_on": "cpu"},
    "all weights in bfloat16": {"train": Trained(weights="bfloat16"), "optimiser": Optimiser("adamw8bit")},
    "adapters": {"train": Trained("lora", rank=2, base="float32")},
    "adapters beside bfloat16": {"train": Trained("lora", rank=2, base="bfloat16")},
    "adafactor": {"optimiser": Optimiser("adafactor")},
}


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.filterwarnings("ignore")  # torchao's, of kernels for other versions of torch
@pytest.mark.parametrize("name", CASES)
def test_bytes_that_stay_are_those_of_the_run(name: str) -> None:
    settings = replace(recipe("flux"), device="cpu", **CASES[name])
    pipe = prepare_pipeline(PIPELINES["flux"]().pipe, settings)
    training = TrainingState.start(settings, pipe.transformer)
    for parameter in training.parameters:
        parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        training.optimiser.step()
    held = plan_memory(settings, PLAN, found=small("flux")).held
    assert held["weights"] == size((*pipe.transformer.parameters(), *pipe.transformer.buffers()))
    assert held["gradients"] == size(p.grad for p in training.parameters if p.grad is not None)
    on_device = size(training.ema.shadow_params) if settings.ema_on == "device" else 0
    assert held["ema"] == on_device
    moments = [value for state in training.optimiser.state.values() for value in state.values() if value.dim() > 0]
    if settings.optimiser.name == "adamw":
        assert held["optimiser"] == size(moments)
    elif settings.optimiser.name == "adafactor":  # a matrix has means of rows and columns, which are not counted
        assert held["optimiser"] == 0
        assert size(moments) == 4 * sum(sum(p.shape) if p.dim() == 2 else p.numel() for p in training.parameters)


def test_eight_bit_moments_are_those_of_torchao() -> None:
    """Of a tensor that is large enough for them; smaller ones keep float32."""
    optim: Any = pytest.importorskip("torchao.optim")
    parameter = torch.nn.Parameter(torch.zeros(64, 256))
    optimiser = optim.AdamW8bit([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimiser.step()
    state = optimiser.state[parameter]
    moments = [state[name] for name in ("exp_avg", "exp_avg_sq")]
    from trajsurgery.training.optimisers import MOMENTS

    held = sum(moment.codes.nbytes + moment.scale.nbytes for moment in moments)
    assert held == MOMENTS["adamw8bit"] * parameter.numel()
