"""Held-out images of a pipe and what reward and rules say of them; the same prompts and noise whenever it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from trajsurgery.evaluation import diversity
from trajsurgery.rewards.by_name import parts
from trajsurgery.training.components import Embeddings, RunComponents, call_of
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Scores:
    """The record of an evaluation, image by image."""

    texts: tuple[str, ...]
    categories: tuple[str, ...]
    reward: Tensor
    """Float[images]."""
    correct: Tensor | None
    """Bool[images]: what the rules say, if there are rules."""
    junk: Tensor | None
    """Float[images]: the share of pixels that belong to nothing."""
    pictures: Tensor
    """UInt8[pictures 3 h w]: the first images."""
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Float[images] by name: what further scorers say, which no gradient climbs, and the parts of a reward that is a
    sum, "WEIGHT*REWARD"."""
    apart: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Float[images] by name: how far each image is from the others of its prompt, NaN if it has none.

    "pixels" is the root mean square difference of pixels in [0, 1]. A further scorer that has `features(images)` adds
    1 - cosine of them. Those of the reward itself are not asked: as it is climbed, they close in on the prompt's text.
    """

    def to_dict(self) -> dict[str, Any]:
        """A dict of tensors, lists and None."""
        return asdict(self) | {"texts": list(self.texts), "categories": list(self.categories)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """What `to_dict` wrote."""
        kept: dict[str, Any] = {**data, "texts": tuple(data["texts"]), "categories": tuple(data["categories"])}
        return cls(**kept)


def spread(asked: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts, the categories in turn, the prompts of each in turn: every beginning is spread evenly too."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in asked:
        groups.setdefault(prompt.category, []).append(prompt)
    rows = list(groups.values())
    return [rows[i % len(rows)][(i // len(rows)) % len(rows[i % len(rows)])] for i in range(count)]


def needed(asked: Sequence[Prompt], count: int) -> list[str]:
    """The prompts that `count` images ask for, in their own order."""
    wanted = {prompt.text for prompt in spread(asked, count)} if asked else set[str]()
    return [prompt.text for prompt in asked if prompt.text in wanted]


def evaluate(recipe: Recipe, world: RunComponents, embeddings: Embeddings | None = None) -> Scores:
    """Images of the held-out prompts and their scores, with the weights that are in the pipe now.

    Args:
        embeddings: of these prompts, if they are there already.
    """
    asked = spread(world.heldout, recipe.evaluation.images)
    verdicts: list[tuple[Tensor, Tensor]] = []
    pictures: list[Tensor] = []
    scorers, views = {"": world.reward, **parts(world.reward), **world.metrics}, _views(world)
    scores, seen = _lists(scorers), _lists(views)
    wanted = [prompt.text for prompt in asked]
    for texts, images in _images(recipe, world, wanted, embeddings or Embeddings(world.pipe, wanted, call_of(recipe))):
        with torch.no_grad():
            for name, scorer in scorers.items():
                scores[name].append(scorer(images, texts).float().cpu())
            for name, (view, _) in views.items():
                seen[name].append(view(images).float().cpu())
        if world.judge is not None:
            verdicts.append(world.judge(images, texts))
        missing = recipe.evaluation.pictures - sum(map(len, pictures))
        pictures.append((images[: max(0, missing)].float().cpu() * 255).round().to(torch.uint8))
    texts = tuple(prompt.text for prompt in asked)
    found = {name: torch.cat(parts) for name, parts in scores.items()}
    return Scores(
        texts,
        tuple(prompt.category for prompt in asked),
        found.pop(""),
        torch.cat([correct for correct, _ in verdicts]).cpu() if verdicts else None,
        torch.cat([junk for _, junk in verdicts]).cpu() if verdicts else None,
        torch.cat(pictures),
        found,
        {name: diversity.apart(torch.cat(seen[name]), texts, distance) for name, (_, distance) in views.items()},
    )


def _lists(names: Iterable[str]) -> dict[str, list[Tensor]]:
    return {name: [] for name in names}


def _views(world: RunComponents) -> dict[str, tuple[Callable[[Tensor], Tensor], diversity.Distance]]:
    """By name, what of the images is compared, and how."""
    known = {name: getattr(scorer, "features", None) for name, scorer in world.metrics.items()}
    features = {name: (view, diversity.angle) for name, view in known.items() if view is not None}
    return {"pixels": (diversity.small, diversity.difference), **features}


def _images(
    recipe: Recipe, world: RunComponents, texts: list[str], embeddings: Embeddings
) -> Iterator[tuple[list[str], Tensor]]:
    """(prompts, images [batch 3 h w]) batch by batch; the noise follows from seed, place and `evaluation.batch`."""
    for start in range(0, len(texts), recipe.evaluation.batch):
        part = texts[start : start + recipe.evaluation.batch]
        images = world.pipe(
            **embeddings(part),
            num_inference_steps=recipe.evaluation.steps,
            **call_of(recipe),
            generator=torch.Generator().manual_seed(2**40 + recipe.seed * 1_000_003 + start),
            output_type="pt",
        )[0]
        yield part, images
