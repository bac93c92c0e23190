"""The moving averages of the weights (diffusers' `EMAModel`), in float32, on the device or on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

AVERAGE = 4
"""Bytes of a parameter's moving average."""


def start_averages(parameters: Sequence[Tensor], decay: float, on_cpu: bool) -> EMAModel:
    """Return averages that begin at the parameters' values.

    Args:
        parameters: this rank's shards.
    """
    averages = EMAModel([], decay=decay)
    place = torch.device("cpu") if on_cpu else None
    averages.shadow_params = [
        p.detach().to(place, torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters
    ]
    return averages


@torch.no_grad()
def update_averages(averages: EMAModel, parameters: Sequence[Tensor]) -> None:
    """Move the averages towards the parameters, by `EMAModel`'s own decay, in place and without a copy of all."""
    averages.optimization_step += 1
    averages.cur_decay_value = averages.get_decay(averages.optimization_step)
    share = 1 - averages.cur_decay_value
    pairs = list(zip(averages.shadow_params, parameters, strict=True))
    if all(average.device == p.device and average.dtype == p.dtype for average, p in pairs):
        lerp: Any = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        lerp(averages.shadow_params, [p.detach() for p in parameters], share)
        return
    for average, parameter in pairs:
        average.lerp_(parameter.detach().to(average.device).to(average.dtype), share)
