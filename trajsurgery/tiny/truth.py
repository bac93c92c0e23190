"""Whether a prompt is true of a scene: exactly the things asked for, in the relation asked for."""

from itertools import permutations

import torch
from torch import Tensor

from trajsurgery.tiny.prompt import Meanings
from trajsurgery.tiny.scene import ABSENT, ANY, APART, RELATIONS, SLOTS, Scenes


def _related(first: Tensor, second: Tensor, relation: Tensor) -> Tensor:
    """Bool: whether centres `first` and `second` (Float[... 2]) stand in the relation; no relation always holds."""
    right, down = (second - first).unbind(-1)
    gaps = torch.stack(torch.broadcast_tensors(right, -right, down, -down), -1)
    return (relation == ANY) | ((gaps > APART) & (relation[..., None] == torch.arange(len(RELATIONS)))).any(-1)


def is_true(scenes: Scenes, meanings: Meanings, every_pair: bool = False) -> Tensor:
    """Bool[batch]: whether prompt i is true of scene i; with `every_pair`, Bool[scenes prompts].

    A scene may have more than SLOTS slots, its objects first: then no prompt is true of it if it fills them.
    """
    shape, colour, centre, count = scenes.shape, scenes.colour, scenes.centre, scenes.count
    if every_pair:
        shape, colour, centre, count = shape[:, None], colour[:, None], centre[:, None], count[:, None]
    requested = meanings.shape != ABSENT
    right = torch.zeros((), dtype=torch.bool)
    for order in permutations(range(SLOTS)):
        chosen = list(order)
        same = (shape[..., chosen] == meanings.shape) & (
            (meanings.colour == ANY) | (colour[..., chosen] == meanings.colour)
        )
        placed = _related(centre[..., order[0], :], centre[..., order[1], :], meanings.relation)
        right = right | ((same | ~requested).all(-1) & placed)
    return right & (count == meanings.count)
