"""Random scenes, each of which makes its prompt true."""

import torch
from torch import Generator, Tensor

from trajsurgery.tiny.prompt import Meanings
from trajsurgery.tiny.scene import ANY, COLOURS, SIDE, SLOTS, Scenes

RADIUS = (4.6, 5.6)  # pixels
JITTER = 1.5  # pixels, each way; with RADIUS it keeps 1.8 pixels between neighbours


def _quadrants(relation: Tensor, generator: Generator) -> Tensor:
    """Return Int[batch SLOTS 2], column and row (0 or 1) of each slot; slots 0 and 1 obey the relation, if any."""
    batch = relation.shape[0]
    free = torch.rand(batch, 4, generator=generator).argsort(-1)[:, :SLOTS]
    cells = torch.stack([free % 2, free // 2], -1)
    pair = torch.randint(2, (batch, 2, 2), generator=generator)
    axis = relation.clamp(min=0) // 2  # 0: columns matter, 1: rows matter
    first = relation.clamp(min=0) % 2  # left of and above put the first thing at 0
    for slot, value in ((0, first), (1, 1 - first)):
        pair[torch.arange(batch), slot, axis] = value
    placed = torch.cat([pair, cells[:, 2:]], 1)
    return torch.where((relation == ANY)[:, None, None], cells, placed)


def compose(meanings: Meanings, generator: Generator) -> Scenes:
    """Draw one scene for each prompt, true to it; what the prompt leaves open (colours, places, sizes) is random."""
    batch = len(meanings)
    free = torch.randint(len(COLOURS), (batch, SLOTS), generator=generator)
    colour = torch.where(meanings.colour == ANY, free, meanings.colour)
    jitter = (2 * torch.rand(batch, SLOTS, 2, generator=generator) - 1) * JITTER
    centre = (_quadrants(meanings.relation, generator) + 0.5) * (SIDE / 2) + jitter
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(batch, SLOTS, generator=generator)
    return Scenes(meanings.shape, colour, centre, radius)
