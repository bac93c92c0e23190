"""Optimisers by name, from torch and torchao."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RecipeError
from trajsurgery.training.settings import Optimiser, Trained

MOMENTS = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "adafactor": 0.0}
"""Bytes of a parameter's moments; those of 8 bits have a float32 scale for each 256 of them."""

LOW_FOR_ADAPTERS = 1e-4
"""The rate of the LoRA presets."""

EIGHT_BIT = "torchao is not installed, which has the 8-bit AdamW: pip install 'trajsurgery[gpu]'."


def rate_remark(trained: Trained, settings: Optimiser) -> str | None:
    """Return a line on a rate that is low for adapters; None if it is not."""
    if trained.what != "lora" or settings.rate >= LOW_FOR_ADAPTERS:
        return None
    return (
        f"--optimiser.rate {settings.rate:g} is low for adapters, which begin at zero: the presets for LoRA take "
        f"{LOW_FOR_ADAPTERS:g}."
    )


def make_optimiser(settings: Optimiser, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser that the settings name.

    - adamw: torch's, with fused kernels (Loshchilov and Hutter, 2019).
    - adamw8bit: torchao's, whose moments have 8 bits in blocks of 256 (Dettmers et al., 2022). bfloat16 weights are
      rounded stochastically, so that steps below their precision count on average.
    - adafactor: torch's; the second moment of a matrix is its rows' and columns' means (Shazeer and Stern, 2018).

    Raises:
        RecipeError: torchao is missing; bfloat16 weights with an optimiser that rounds small steps away.
    """
    rate, decay, low = settings.rate, settings.weight_decay, any(p.dtype == torch.bfloat16 for p in parameters)
    if low and settings.name != "adamw8bit":
        raise RecipeError(
            f"--train.weights bfloat16 --optimiser.name {settings.name}: steps smaller than bfloat16 can hold would be "
            "rounded away. Take --optimiser.name adamw8bit, which rounds stochastically, or float32 weights."
        )
    if settings.name == "adamw8bit":
        eight_bit: Any = _torchao().AdamW8bit
        return eight_bit(parameters, rate, settings.betas, weight_decay=decay, bf16_stochastic_round=low)
    if settings.name == "adafactor":
        return torch.optim.Adafactor(parameters, rate, weight_decay=decay)
    return torch.optim.AdamW(parameters, rate, settings.betas, weight_decay=decay, fused=True)


def _torchao() -> Any:
    if find_spec("torchao") is None:
        raise RecipeError(f"--optimiser.name adamw8bit: {EIGHT_BIT}")
    with warnings.catch_warnings():  # of kernels that it has for other versions of torch
        warnings.simplefilter("ignore")
        return import_module("torchao.optim")


def step(optimiser: torch.optim.Optimizer, seed: int) -> None:
    """Step an optimiser. Stochastic rounding draws from `seed`, and torch's global generators stay as they are."""
    parameter: Tensor = optimiser.param_groups[0]["params"][0]
    with torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
        torch.manual_seed(seed)
        optimiser.step()


def set_rate(optimiser: torch.optim.Optimizer, settings: Optimiser, iteration: int) -> None:
    """Set the learning rate of an iteration (from 1): rising linearly over the warm-up, then left as it is."""
    if iteration > settings.warmup:
        return
    rate = settings.rate * iteration / settings.warmup
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, so that its compiled step is not compiled anew
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
