"""Training videos of the tiny Wan: one moving shape true to its prompt, or many shapes at once."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from benchmarks.world.compose import JITTER, RADIUS
from benchmarks.world.render import render
from trajsurgery.tiny.scene import ABSENT, COLOURS, SHAPES, SIDE, Scenes
from trajsurgery.tiny.video import FRAMES, UNITS, Motion

TRAVEL = (10.0, 14.0)  # pixels from the first to the last frame
MARGIN = 7.0  # pixels between a centre and the edge: the largest radius, and a little


def film(prompts: Sequence[Motion], generator: Generator) -> Tensor:
    """Render a video true to each prompt, Float[batch FRAMES 3 SIDE SIDE] in [0, 1], otherwise random."""
    batch = len(prompts)
    least, most = TRAVEL
    travel = least + (most - least) * torch.rand(batch, 1, generator=generator)
    step = torch.tensor([UNITS[p.direction] for p in prompts]) * travel
    room = SIDE - 2 * MARGIN - step.abs()
    start = MARGIN + room * torch.rand(batch, 2, generator=generator) + (-step).clamp(min=0)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(batch, generator=generator)
    share = torch.linspace(0, 1, FRAMES)[None, :, None]
    centre = (start[:, None] + share * step[:, None]).flatten(0, 1)[:, None]

    def each_frame(values: Tensor) -> Tensor:
        return values.repeat_interleave(FRAMES)[:, None]

    shape, colour = (torch.tensor([getattr(p, name) for p in prompts]) for name in ("shape", "colour"))
    scenes = Scenes(each_frame(shape), each_frame(colour), centre, each_frame(radius))
    return render(scenes).unflatten(0, (batch, FRAMES))


def crowd(batch: int, generator: Generator, frames: int = FRAMES) -> Tensor:
    """Render videos full of shapes, Float[batch frames 3 SIDE SIDE] in [0, 1]; they teach an autoencoder outlines.

    A lattice of shapes that do not touch, wider than the frame, moves in one direction; a quarter of its places is
    empty.
    """
    side = torch.arange(-1, 3) + 0.5
    cells = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(1, -1, 2) * SIDE / 2
    sizes = (batch, cells.shape[1])
    shape = torch.randint(len(SHAPES), sizes, generator=generator)
    shape = torch.where(torch.rand(sizes, generator=generator) < 0.25, ABSENT, shape)
    colour = torch.randint(len(COLOURS), sizes, generator=generator)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(sizes, generator=generator)
    jitter = (2 * torch.rand(*sizes, 2, generator=generator) - 1) * JITTER
    shift = (torch.rand(batch, 1, 2, generator=generator) - 0.5) * SIDE / 2
    direction = torch.tensor(UNITS)[torch.randint(len(UNITS), (batch,), generator=generator)]
    travel = TRAVEL[0] + (TRAVEL[1] - TRAVEL[0]) * torch.rand(batch, 1, generator=generator)
    share = torch.linspace(-0.5, 0.5, FRAMES)[:frames, None, None]
    centre = (cells + jitter + shift)[:, None] + share * (direction * travel)[:, None, None]
    parts = (values.repeat_interleave(frames, 0) for values in (shape, colour, radius))
    shape, colour, radius = parts
    return render(Scenes(shape, colour, centre.flatten(0, 1), radius)).unflatten(0, (batch, frames))
