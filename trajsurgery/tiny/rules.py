"""The rule-based evaluator: does the picture show what its prompt asks for? Nothing is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from trajsurgery.tiny.prompt import CATEGORIES, Meanings, Prompt, meanings, understand
from trajsurgery.tiny.scene import ABSENT, ANY, APART, RELATIONS, SIDE, SLOTS, Scenes
from trajsurgery.tiny.segment import segment
from trajsurgery.tiny.video import Motion


def table_by_category(
    correct: Tensor, prompts: Sequence[Prompt | Motion], categories: Sequence[str]
) -> dict[str, tuple[float, int]]:
    """Per category that has prompts, and "overall": the share judged correct, and of how many."""
    groups = {c: torch.tensor([p.category == c for p in prompts], dtype=torch.bool) for c in categories}
    groups["overall"] = torch.ones(len(prompts), dtype=torch.bool)
    return {c: (float(correct[g].float().mean()), int(g.sum())) for c, g in groups.items() if bool(g.any())}


@dataclass(frozen=True)
class Verdict:
    """What the rules say of a batch. correct: Bool[batch]; junk: Float[batch], share of pixels in [0, 1]."""

    correct: Tensor
    junk: Tensor
    scenes: Scenes
    prompts: tuple[Prompt, ...]

    def table(self) -> dict[str, tuple[float, int]]:
        """Per category of the prompts judged, and "overall": the share judged correct, and of how many."""
        return table_by_category(self.correct, self.prompts, CATEGORIES)


def judge(images: Tensor, prompts: Sequence[Prompt | str]) -> Verdict:
    """Judges images, Float[batch 3 SIDE SIDE] in [0, 1], each by its prompt.

    A picture is correct if it shows exactly the things asked for, each of a known shape, in the relation asked for.
    Raises ValueError if shapes or numbers do not match, or on a text that the world can't say.
    """
    if images.dim() != 4 or images.shape[1:] != (3, SIDE, SIDE) or len(images) != len(prompts):
        raise ValueError(
            f"judge() takes images [batch, 3, {SIDE}, {SIDE}] and one prompt for each; "
            f"received {tuple(images.shape)} and {len(prompts)} prompts"
        )
    parsed = understand(prompts)
    scenes, junk = segment(images)
    return Verdict(is_true(scenes, meanings(parsed)), junk, scenes, tuple(parsed))


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
