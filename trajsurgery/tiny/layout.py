"""Where things are: what each quadrant of a scene holds, and what a prompt says of it. The encoders' first lesson."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional

from trajsurgery.tiny.compose import compose
from trajsurgery.tiny.prompt import Prompt, meanings
from trajsurgery.tiny.scene import ABSENT, COLOURS, SHAPES, SIDE, Scenes

KINDS = len(SHAPES) * len(COLOURS)
SCENES = 256  # drawn for each prompt to estimate its layout


def contents(scenes: Scenes) -> Tensor:
    """Float[batch 4 KINDS+1]: one-hot, which kind of object each quadrant holds; the last is "nothing"."""
    cell = (scenes.centre / (SIDE / 2)).long()
    quadrant = (cell[..., 0] + 2 * cell[..., 1])[..., None].expand(-1, -1, KINDS + 1)
    kind = (scenes.shape * len(COLOURS) + scenes.colour).clamp(min=0)
    thing = functional.one_hot(kind, KINDS + 1).float() * (scenes.shape != ABSENT)[..., None]
    held = torch.zeros(len(scenes), 4, KINDS + 1).scatter_add_(1, quadrant, thing)
    held[..., KINDS] = 1 - held[..., :KINDS].sum(-1)
    return held


def layouts(prompts: Sequence[Prompt], generator: Generator) -> Tensor:
    """Float[prompts 4 KINDS+1]: over SCENES scenes of each prompt, how often each quadrant holds each kind."""
    rows = torch.arange(len(prompts)).repeat_interleave(SCENES)
    scenes = compose(meanings(prompts)[rows], generator)
    return contents(scenes).view(len(prompts), SCENES, 4, KINDS + 1).mean(1)


def divergence(guess: Tensor, layout: Tensor) -> Tensor:
    """Float[batch]: the Kullback-Leibler divergence of guessed from true layouts, over the quadrants.

    guess: logits, Float[batch 4*(KINDS+1)]; layout: Float[batch 4 KINDS+1], distributions.
    """
    logs = guess.view(layout.shape).log_softmax(-1)
    return (layout * (layout.clamp(min=1e-6).log() - logs)).sum((1, 2))
