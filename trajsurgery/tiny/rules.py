"""The rule-based evaluator: does the picture show what its prompt asks for? Nothing is learned."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trajsurgery.tiny.prompt import CATEGORIES, Prompt, meanings, understand
from trajsurgery.tiny.scene import SIDE, Scenes
from trajsurgery.tiny.segment import segment
from trajsurgery.tiny.truth import is_true


@dataclass(frozen=True)
class Verdict:
    """What the rules say of a batch. correct: Bool[batch]; junk: Float[batch], share of pixels in [0, 1]."""

    correct: Tensor
    junk: Tensor
    scenes: Scenes
    prompts: tuple[Prompt, ...]

    def table(self) -> dict[str, tuple[float, int]]:
        """Per category of the prompts judged, and "overall": the share judged correct, and of how many."""
        groups = {c: torch.tensor([p.category == c for p in self.prompts], dtype=torch.bool) for c in CATEGORIES}
        groups["overall"] = torch.ones(len(self.prompts), dtype=torch.bool)
        return {c: (float(self.correct[g].float().mean()), int(g.sum())) for c, g in groups.items() if bool(g.any())}


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
