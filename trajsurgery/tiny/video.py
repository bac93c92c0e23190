"""The video world: one coloured shape on grey that moves in the direction its prompt says. Prompts, scenes, frames."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Generator, Tensor

from trajsurgery.tiny.prompt import SPLITS, Split
from trajsurgery.tiny.render import render
from trajsurgery.tiny.scene import ABSENT, COLOURS, JITTER, RADIUS, SHAPES, SIDE, Scenes

DIRECTIONS = ("right", "left", "down", "up")
UNITS = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))  # (x, y), y downwards
WORDINGS = ("a {} moves {}", "the {} goes {}")
FRAMES = 5  # three frames of latents
TRAVEL = (10.0, 14.0)  # pixels from the first to the last frame
MARGIN = 7.0  # pixels between a centre and the edge: the largest radius, and a little
HELDOUT, VALIDATION = 2, 1  # of the twelve things in each direction


@dataclass(frozen=True)
class Motion:
    """A prompt and what it means: this thing, moving in this direction. The numbers index the worlds' tables."""

    text: str
    shape: int
    colour: int
    direction: int

    @property
    def category(self) -> str:
        """The direction."""
        return DIRECTIONS[self.direction]

    def __str__(self) -> str:
        return self.text


@cache
def every_motion() -> tuple[Motion, ...]:
    """All prompts, those of a direction together."""
    return tuple(
        Motion(wording.format(f"{COLOURS[c]} {SHAPES[s]}", DIRECTIONS[d]), s, c, d)
        for d, s, c, wording in product(range(len(DIRECTIONS)), range(len(SHAPES)), range(len(COLOURS)), WORDINGS)
    )


@cache
def motions(split: Split) -> tuple[Motion, ...]:
    """The prompts of a split: no thing moves in the same direction in two of them.

    Raises ValueError for a name that is no split.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
    chosen: set[tuple[int, int, int]] = set()
    for direction in range(len(DIRECTIONS)):
        things = list(product(range(len(SHAPES)), range(len(COLOURS))))
        random.Random(f"trajsurgery video {direction}").shuffle(things)
        ends = {"heldout": (0, HELDOUT), "validation": (HELDOUT, HELDOUT + VALIDATION)}
        start, end = ends.get(split, (HELDOUT + VALIDATION, len(things)))
        chosen |= {(direction, *thing) for thing in things[start:end]}
    return tuple(m for m in every_motion() if (m.direction, m.shape, m.colour) in chosen)


@cache
def _by_text() -> dict[str, Motion]:
    return {motion.text: motion for motion in every_motion()}


def understand(prompts: Sequence[Motion | str]) -> list[Motion]:
    """Prompts, or their texts, as prompts. Raises ValueError on a text that the world can't say."""
    known = _by_text()
    for prompt in prompts:
        if isinstance(prompt, str) and prompt not in known:
            raise ValueError(
                f"the video world has no prompt {prompt!r}; say it like {every_motion()[0].text!r} or like "
                f"{every_motion()[-1].text!r}"
            )
    return [known[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]


def prompts(split: Split, generator: Generator | None = None, count: int | None = None) -> list[Motion]:
    """All prompts of a split; with a generator and a count, so many of them, all equally likely.

    Raises ValueError for another split, or if only one of generator and count is given.
    """
    known = motions(split)
    if (generator is None) != (count is None):
        raise ValueError("prompts() draws `count` prompts with a `generator`: give both, or neither for all of them")
    if generator is None or count is None:
        return list(known)
    return [known[i] for i in torch.randint(len(known), (count,), generator=generator).tolist()]


def film(prompts: Sequence[Motion], generator: Generator) -> Tensor:
    """A video true to each prompt, Float[batch FRAMES 3 SIDE SIDE] in [0, 1]: place, size and travel are drawn."""
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
    """Videos full of shapes, Float[batch frames 3 SIDE SIDE] in [0, 1]: what an autoencoder learns outlines from.

    A lattice of shapes that do not touch, wider than the frame, moves one way; a quarter of its places is empty.
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
