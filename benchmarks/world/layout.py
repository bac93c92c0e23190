"""Layouts: the contents of each quadrant of a scene, and what a prompt says about them: targets of the heads."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional

from benchmarks.world.compose import compose
from trajsurgery.tiny.prompt import Prompt, meanings
from trajsurgery.tiny.scene import ABSENT, COLOURS, SHAPES, SIDE, SLOTS, Scenes

KINDS = len(SHAPES) * len(COLOURS)
SCENES = 256  # drawn for each prompt to estimate its layout


def contents(scenes: Scenes) -> Tensor:
    """Return Float[batch 4 KINDS+1], one-hot: the kind of object in each quadrant; the last is "nothing"."""
    cell = (scenes.centre / (SIDE / 2)).long()
    quadrant = (cell[..., 0] + 2 * cell[..., 1])[..., None].expand(-1, -1, KINDS + 1)
    kind = (scenes.shape * len(COLOURS) + scenes.colour).clamp(min=0)
    thing = functional.one_hot(kind, KINDS + 1).float() * (scenes.shape != ABSENT)[..., None]
    quadrant_contents = torch.zeros(len(scenes), 4, KINDS + 1).scatter_add_(1, quadrant, thing)
    quadrant_contents[..., KINDS] = 1 - quadrant_contents[..., :KINDS].sum(-1)
    return quadrant_contents


def layouts(prompts: Sequence[Prompt], generator: Generator) -> Tensor:
    """Return Float[prompts 4 KINDS+1]: over SCENES scenes of each prompt, how often each quadrant holds each kind."""
    rows = torch.arange(len(prompts)).repeat_interleave(SCENES)
    scenes = compose(meanings(prompts)[rows], generator)
    return contents(scenes).view(len(prompts), SCENES, 4, KINDS + 1).mean(1)


def places(prompts: Sequence[Prompt], generator: Generator) -> Tensor:
    """Return Float[prompts SLOTS KINDS+4]: for each thing, how often it is of which kind, and in which quadrant.

    Estimated over SCENES scenes of each prompt. The rows of empty slots have no meaning.
    """
    rows = torch.arange(len(prompts)).repeat_interleave(SCENES)
    scenes = compose(meanings(prompts)[rows], generator)
    cell = (scenes.centre / (SIDE / 2)).long()
    quadrant = functional.one_hot(cell[..., 0] + 2 * cell[..., 1], 4)
    kind = functional.one_hot((scenes.shape * len(COLOURS) + scenes.colour).clamp(min=0), KINDS)
    drawn = torch.cat([kind, quadrant], -1).float()
    return drawn.view(len(prompts), SCENES, SLOTS, KINDS + 4).mean(1)


def nouns(texts: Sequence[str]) -> Tensor:
    """Return Int[prompts SLOTS]: the word that names each thing; -1 beyond ("three circles" has one noun)."""
    words = torch.full((len(texts), SLOTS), -1)
    for row, text in zip(words, texts, strict=True):
        named = [i for i, word in enumerate(text.split()) if word.removesuffix("s") in SHAPES]
        row[: len(named)] = torch.tensor(named)
    return words


def divergence(guess: Tensor, layout: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of predicted from true layouts, summed over the quadrants, Float[batch].

    guess: logits, Float[batch 4*(KINDS+1)]; layout: Float[batch 4 KINDS+1], distributions.
    """
    return kl_divergence(guess.view(layout.shape), layout).sum(1)


def kl_divergence(guess: Tensor, truth: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of softmax(guess) from truth, Float[...]; both are Float[... kinds]."""
    return (truth * (truth.clamp(min=1e-6).log() - guess.log_softmax(-1))).sum(-1)
