"""From an original's state dict to modules: names, towers, and heads of linear layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from trajsurgery.errors import RewardError


def rename_weights(
    reward: str, names: Sequence[tuple[str, str]], unused: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an original's state dict under our names, without what no score looks at.

    Args:
        names: regular expressions for the originals' names, and what to put in place of the match.
        unused: one for names to leave out.

    Raises:
        RewardError: a name that the original does not have.
    """
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        if re.match(unused, key):
            continue
        ours = next((re.sub(pattern, name, key) for pattern, name in names if re.match(pattern, key)), None)
        if ours is None:
            raise RewardError(f"{reward}: the file holds {key!r}, which the original's does not.")
        weights[ours] = value
    return weights


def load_part(path: Path, part: nn.Module, weights: Mapping[str, Tensor], what: str, assign: bool = False) -> None:
    """Load weights into a module.

    Args:
        assign: the module takes the tensors themselves, with their dtype and device.

    Raises:
        RewardError: they are not all of its weights, or others.
    """
    try:
        part.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        raise RewardError(f"{path.name} does not hold {what}: {error}") from error


def weights_under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def linear_head(reward: str, state: Mapping[str, Tensor], width: int) -> nn.Sequential:
    """Build the layers of a state dict, in the order of the numbers in their names.

    Dropout layers, which have numbers and no weights, are left out.

    Args:
        width: input width.

    Raises:
        RewardError: the layers do not fit one another, or do not end in one number.
    """
    names = [key.removesuffix("weight") for key in state if key.endswith("weight")]
    names.sort(key=lambda name: int(re.sub(r"\D", "", name) or 0))
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
