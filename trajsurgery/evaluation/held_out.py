"""Score images of held-out prompts; prompts and noise are the same in every evaluation of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from trajsurgery.evaluation import diversity
from trajsurgery.rewards.loading import mixture_parts
from trajsurgery.training.components import PromptCache, RunComponents, pipeline_arguments
from trajsurgery.training.distributed import ranks
from trajsurgery.training.faults.memory_errors import memory_of
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.recipe import Recipe


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """The result of an evaluation, image by image."""

    texts: tuple[str, ...]
    categories: tuple[str, ...]
    reward: Tensor
    """Float[images]."""
    correct: Tensor | None
    """Bool[images]: the rules' verdict, if there are rules."""
    junk: Tensor | None
    """Float[images]: the share of pixels that belong to no object, if there are rules."""
    pictures: Tensor
    """UInt8[pictures 3 h w]: the first images."""
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Float[images] by name: further scorers, which are not trained on, and the parts of a reward that is a sum,
    "WEIGHT*REWARD".
    """
    apart: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Float[images] by name: how far each image is from the others of its prompt, NaN if it has none.

    "pixels" is the root mean square difference of pixels in [0, 1]. A further scorer with `features(images)` adds 1 -
    cosine of them. The reward's own features are not used: as the reward rises, they move towards the prompt's text.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of tensors, lists and None."""
        return asdict(self) | {"texts": list(self.texts), "categories": list(self.categories)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeldOutScores:
        """Restore what `to_dict` returned."""
        fields: dict[str, Any] = {**data, "texts": tuple(data["texts"]), "categories": tuple(data["categories"])}
        return cls(**fields)


def spread_over_categories(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` prompts, taking categories in turn, so that every beginning is spread evenly too."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    turns = cycle([cycle(group) for group in groups.values()])
    return [next(group) for group in islice(turns, count)]


def needed_prompts(prompts: Sequence[Prompt], count: int) -> list[str]:
    """Return the texts of the prompts that `count` images use, in their own order."""
    used = {prompt.text for prompt in spread_over_categories(prompts, count)} if prompts else set[str]()
    return [prompt.text for prompt in prompts if prompt.text in used]


def evaluate(recipe: Recipe, world: RunComponents, embeddings: PromptCache | None = None) -> HeldOutScores:
    """Make images of the held-out prompts with the current weights, and score them; each rank makes its share.

    Under no_grad and not in inference mode: what a model caches (rotary embeddings, a reward's texts) and what FSDP
    gathers would be of no use to a later backward pass, and compiled blocks would be compiled anew.

    Args:
        embeddings: the encodings of these prompts, if they exist.
    """
    prompts = spread_over_categories(world.heldout, recipe.evaluation.images)
    texts, features = tuple(prompt.text for prompt in prompts), _image_features(world)
    cache = embeddings or PromptCache(world.pipe, texts, pipeline_arguments(recipe))
    with memory_of(f"held-out images (--evaluation.batch {recipe.evaluation.batch} at once)"):
        share = [_score_batch(recipe, world, *batch) for batch in _sample_images(recipe, world, texts, cache)]
    in_order = [batch for each in zip(*ranks.gathered(share), strict=True) for batch in each]
    batches = in_order[: math.ceil(len(texts) / recipe.evaluation.batch)]
    columns = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return HeldOutScores(
        texts,
        tuple(prompt.category for prompt in prompts),
        columns["reward", ""],
        columns.get(("rules", "correct")),
        columns.get(("rules", "junk")),
        columns["pictures", ""],
        {name: column for (kind, name), column in columns.items() if kind == "metric"},
        {
            name: diversity.distance_to_others(columns["feature", name], texts, distance)
            for name, (_, distance) in features.items()
        },
    )


@torch.no_grad()
def _score_batch(
    recipe: Recipe, world: RunComponents, start: int, texts: list[str], images: Tensor
) -> dict[tuple[str, str], Tensor]:
    """Return scores, features and pictures of a batch of images, on the CPU, by (kind, name)."""
    columns = {("reward", ""): world.reward(images, texts).float()}
    for name, scorer in {**mixture_parts(world.reward), **world.metrics}.items():
        columns["metric", name] = scorer(images, texts).float()
    for name, (extract, _) in _image_features(world).items():
        columns["feature", name] = extract(images).float()
    if world.judge is not None:
        columns["rules", "correct"], columns["rules", "junk"] = world.judge(images, texts)
    shown = images[: max(0, recipe.evaluation.pictures - start)]
    columns["pictures", ""] = (shown.float() * 255).round().to(torch.uint8)
    return {key: column.cpu() for key, column in columns.items()}


def _image_features(world: RunComponents) -> dict[str, tuple[Callable[[Tensor], Tensor], diversity.Distance]]:
    """Return, by name, the function that extracts what is compared, and the distance to compare it with."""
    extractors = {name: getattr(scorer, "features", None) for name, scorer in world.metrics.items()}
    features = {name: (extract, diversity.angle) for name, extract in extractors.items() if extract is not None}
    return {"pixels": (diversity.downscaled, diversity.difference), **features}


def _sample_images(
    recipe: Recipe, world: RunComponents, texts: Sequence[str], embeddings: PromptCache
) -> Iterator[tuple[int, list[str], Tensor]]:
    """Yield (position, prompts, images [batch 3 h w]) of every Nth batch, N the number of ranks.

    The noise follows from seed, position and `evaluation.batch`. All ranks yield as many batches, since sharded weights
    are gathered by all of them together: beyond the last batch the first ones are made again.
    """
    starts = range(0, len(texts), recipe.evaluation.batch)
    for number in range(ranks.rank(), math.ceil(len(starts) / ranks.count()) * ranks.count(), ranks.count()):
        start = starts[number % len(starts)]
        part = list(texts[start : start + recipe.evaluation.batch])
        images = world.pipe(
            **embeddings(part),
            num_inference_steps=recipe.evaluation.steps,
            **pipeline_arguments(recipe),
            generator=torch.Generator().manual_seed(2**40 + recipe.seed * 1_000_003 + start),
            output_type="pt",
        )[0]
        yield start, part, images
