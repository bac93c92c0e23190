"""The rule-based evaluator of videos: the requested shape, alone in every frame, moving as requested."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trajsurgery.tiny.rules import table_by_category
from trajsurgery.tiny.scene import SIDE
from trajsurgery.tiny.segment import segment
from trajsurgery.tiny.video import DIRECTIONS, UNITS, Motion, prompts, understand

__all__ = ["MotionVerdict", "judge", "prompts"]

FAR = 6.0  # pixels from first to last frame for a motion to count; the world's videos have at least 10
STRAIGHT = 0.5  # the most that the motion across may be, as a share of that along


@dataclass(frozen=True)
class MotionVerdict:
    """What the rules say of a batch: correct is `there` and `moves`.

    correct, there, moves: Bool[batch]. there: the thing asked for, alone, in every frame. moves: the largest blob goes
    the way asked. along, across: Float[batch], its displacement in pixels. junk: Float[batch], share of pixels.
    """

    correct: Tensor
    there: Tensor
    moves: Tensor
    along: Tensor
    across: Tensor
    junk: Tensor
    prompts: tuple[Motion, ...]

    def table(self) -> dict[str, tuple[float, int]]:
        """Per direction asked for, and "overall": the share judged correct, and of how many."""
        return table_by_category(self.correct, self.prompts, DIRECTIONS)


def judge(frames: Tensor, prompts: Sequence[Motion | str]) -> MotionVerdict:
    """Judges videos, Float[batch frames 3 SIDE SIDE] in [0, 1], each by its prompt.

    Raises ValueError if shapes or numbers do not match, or on a text that the world can't say.
    """
    if frames.dim() != 5 or frames.shape[2:] != (3, SIDE, SIDE) or len(frames) != len(prompts):
        raise ValueError(
            f"judge() takes videos [batch, frames, 3, {SIDE}, {SIDE}] and one prompt for each; "
            f"received {tuple(frames.shape)} and {len(prompts)} prompts"
        )
    motions = understand(prompts)
    scenes, junk = segment(frames.flatten(0, 1))
    each = frames.shape[:2]
    shape, colour = (torch.tensor([getattr(p, n) for p in motions])[:, None] for n in ("shape", "colour"))
    same = (scenes.shape[:, 0].view(each) == shape) & (scenes.colour[:, 0].view(each) == colour)
    there = (same & (scenes.count.view(each) == 1)).all(1)
    centre = scenes.centre[:, 0].view(*each, 2)
    moved = centre[:, -1] - centre[:, 0]
    unit = torch.tensor([UNITS[p.direction] for p in motions])
    along = (moved * unit).sum(-1)
    across = (moved - along[:, None] * unit).norm(dim=-1)
    moves = (along > FAR) & (across < STRAIGHT * along)
    return MotionVerdict(there & moves, there, moves, along, across, junk.view(each).mean(1), tuple(motions))
