"""Heads of linear layers without activations between them, as in LAION's predictor and ImageReward."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from trajsurgery.errors import RewardError


def linear_head(reward: str, state: Mapping[str, Tensor], width: int) -> nn.Sequential:
    """Build the layers of a state dict, in the order of the numbers in their names.

    Dropout layers, which have numbers and no weights, are left out.

    Args:
        width: input width.

    Raises:
        RewardError: the layers do not fit one another, or do not end in one number.
    """
    names = sorted((key.removesuffix("weight") for key in state if key.endswith("weight")), key=_number)
    layers = nn.Sequential()
    for name in names:
        weight = state[f"{name}weight"]
        if weight.dim() != 2 or weight.shape[1] != width or f"{name}bias" not in state:
            break
        layer = nn.Linear(width, len(weight), device=weight.device)
        layer.load_state_dict({"weight": weight, "bias": state[f"{name}bias"]})
        layers.append(layer)
        width = len(weight)
    if not names or len(layers) < len(names) or len(state) != 2 * len(names) or width != 1:
        shapes = {key: list(value.shape) for key, value in state.items()}
        raise RewardError(f"{reward}: these are not the linear layers of its head: {shapes}.")
    return layers


def _number(name: str) -> int:
    match = re.search(r"\d+", name)
    return int(match.group()) if match else 0
