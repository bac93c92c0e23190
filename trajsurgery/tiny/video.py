"""The video world: one coloured shape on grey that moves in the direction its prompt says."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Generator

from trajsurgery.tiny.prompt import SPLITS, Split
from trajsurgery.tiny.scene import COLOURS, SHAPES

DIRECTIONS = ("right", "left", "down", "up")
UNITS = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))  # (x, y), y downwards
WORDINGS = ("a {} moves {}", "the {} goes {}")
FRAMES = 5  # three frames of latents
LATENT = (8, 3, 8, 8)  # of one video
GUIDANCE = 2.0
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


def understand(prompts: Sequence[Motion | str]) -> list[Motion]:
    """Prompts, or their texts, as prompts. Raises ValueError on a text that the world can't say."""
    by_text = {prompt.text: prompt for prompt in every_motion()}
    for prompt in prompts:
        if isinstance(prompt, str) and prompt not in by_text:
            raise ValueError(
                f"the video world has no prompt {prompt!r}; say it like {every_motion()[0].text!r} or like "
                f"{every_motion()[-1].text!r}"
            )
    return [by_text[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]


def prompts(split: Split, generator: Generator | None = None, count: int | None = None) -> list[Motion]:
    """All prompts of a split; with a generator and a count, so many of them, all equally likely.

    Raises ValueError for another split, or if only one of generator and count is given.
    """
    motions_of_split = motions(split)
    if (generator is None) != (count is None):
        raise ValueError("prompts() draws `count` prompts with a `generator`: give both, or neither for all of them")
    if generator is None or count is None:
        return list(motions_of_split)
    return [motions_of_split[i] for i in torch.randint(len(motions_of_split), (count,), generator=generator).tolist()]
