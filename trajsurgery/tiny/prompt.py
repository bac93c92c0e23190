"""The prompts of the world: GenEval's six categories, their wording, and three disjoint splits."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from trajsurgery.tiny.scene import ABSENT, ANY, COLOURS, RELATIONS, SHAPES, SLOTS

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribute binding")
# Post-training draws its prompts in the paper's ratio, in the order of CATEGORIES.
RATIO: dict[str, float] = dict(zip(CATEGORIES, (0, 1, 5, 1, 7, 3), strict=True))
# Or in this one: a model of a million parameters forgets categories without prompts (benchmarks/world/README.md).
EVEN_RATIO: dict[str, float] = dict(zip(CATEGORIES, (2, 2, 2, 2, 4, 3), strict=True))
HELDOUT, VALIDATION = 0.2, 0.15  # shares of each category's prompts


class Thing(NamedTuple):
    """An object that a prompt asks for; a colour of None is any colour."""

    shape: str
    colour: str | None = None

    def __str__(self) -> str:
        return self.shape if self.colour is None else f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it means: a right picture shows exactly these things, the first `relation` the second."""

    text: str
    category: str
    things: tuple[Thing, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Meanings:
    """Prompts as tensors. shape, colour: Int[prompts SLOTS], ABSENT and ANY as in `Scenes`; relation: Int[prompts]."""

    shape: Tensor
    colour: Tensor
    relation: Tensor

    @property
    def count(self) -> Tensor:
        """Int[prompts]: how many objects each prompt asks for."""
        return (self.shape != ABSENT).sum(-1)

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, index: Tensor | slice) -> "Meanings":
        return Meanings(self.shape[index], self.colour[index], self.relation[index])


def meanings(prompts: Sequence[Prompt]) -> Meanings:
    """The prompts' meanings as tensors, in order."""
    slots = [[*prompt.things, *[None] * (SLOTS - len(prompt.things))] for prompt in prompts]
    shape = [[SHAPES.index(thing.shape) if thing else ABSENT for thing in row] for row in slots]
    colour = [[COLOURS.index(thing.colour) if thing and thing.colour else ANY for thing in row] for row in slots]
    relation = [RELATIONS.index(prompt.relation) if prompt.relation else ANY for prompt in prompts]
    return Meanings(torch.tensor(shape).view(-1, SLOTS), torch.tensor(colour).view(-1, SLOTS), torch.tensor(relation))


def _one() -> list[Prompt]:
    articles = ("a", "one", "a single", "only a", "just a", "a lone")
    singles = [Prompt(f"{a} {s}", "single object", (Thing(s),)) for a, s in product(articles, SHAPES)]
    wordings = ("a {c} {s}", "a {s} in {c}", "one {c} {s}")
    return singles + [
        Prompt(wording.format(c=c, s=s), "colours", (Thing(s, c),))
        for wording, c, s in product(wordings, COLOURS, SHAPES)
    ]


def _many() -> list[Prompt]:
    things = [Thing(s, c) for c, s in product((None, *COLOURS), SHAPES)]
    return [
        Prompt(f"{before}{number} {thing}s", "counting", (thing,) * n)
        for before, (number, n), thing in product(("", "exactly "), (("two", 2), ("three", 3)), things)
    ]


def _two() -> list[Prompt]:
    plain = [(Thing(a), Thing(b)) for a, b in permutations(SHAPES, 2)]
    coloured = [
        (Thing(a, c), Thing(b, d)) for (a, b), (c, d) in product(permutations(SHAPES, 2), permutations(COLOURS, 2))
    ]
    wordings = ("a {} and a {}", "a {} with a {}", "a {} near a {}", "both a {} and a {}")
    pairs = [Prompt(w.format(*pair), "two objects", pair) for w, pair in product(wordings, plain)]
    bound = [Prompt(w.format(*pair), "attribute binding", pair) for w, pair in product(wordings[:2], coloured)]
    placed = [
        Prompt(f"a {a} {relation} a {b}", "position", (a, b), relation)
        for relation, (a, b) in product(RELATIONS, plain + coloured)
    ]
    return pairs + bound + placed


@cache
def every_prompt() -> tuple[Prompt, ...]:
    """All prompts of the world, grouped by category in the order of CATEGORIES."""
    made = _one() + _many() + _two()
    return tuple(prompt for category in CATEGORIES for prompt in made if prompt.category == category)


@cache
def split_prompts(split: Split) -> tuple[Prompt, ...]:
    """The prompts of a split. The splits are disjoint and each has prompts of every category.

    Raises ValueError for a name that is no split.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
    chosen: list[Prompt] = []
    for category in CATEGORIES:
        group = [prompt for prompt in every_prompt() if prompt.category == category]
        random.Random(f"trajsurgery {category}").shuffle(group)
        held, validated = round(HELDOUT * len(group)), round(VALIDATION * len(group))
        parts = {
            "heldout": group[:held],
            "validation": group[held : held + validated],
            "train": group[held + validated :],
        }
        chosen += parts[split]
    return tuple(chosen)


def understand(prompts: Sequence[Prompt | str]) -> list[Prompt]:
    """Prompts, or their texts, as prompts. Raises ValueError on a text that the world can't say."""
    by_text = {prompt.text: prompt for prompt in every_prompt()}
    for prompt in prompts:
        if isinstance(prompt, str) and prompt not in by_text:
            raise ValueError(
                f"the embedded world has no prompt {prompt!r}; say it like {every_prompt()[-1].text!r} or like one of "
                "trajsurgery.tiny.prompts('train')"
            )
    return [by_text[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]


def draw_prompts(split: Split, count: int, weights: Mapping[str, float], generator: Generator) -> list[Prompt]:
    """`count` prompts of a split: the category by weight, then one of its prompts, all equally likely.

    Raises ValueError for another category, or without a weight above 0.
    """
    if not set(weights) <= set(CATEGORIES) or not any(weights.values()):
        raise ValueError(f"a ratio of {dict(weights)}: it weighs some of the categories {', '.join(CATEGORIES)}")
    groups = {c: [prompt for prompt in split_prompts(split) if prompt.category == c] for c in CATEGORIES}
    odds = torch.tensor([float(weights.get(c, 0)) for c in CATEGORIES])
    categories = torch.multinomial(odds, count, replacement=True, generator=generator).tolist()
    places = torch.rand(count, generator=generator).tolist()
    drawn = [groups[CATEGORIES[c]] for c in categories]
    return [group[int(place * len(group))] for group, place in zip(drawn, places)]
