"""Hard negatives: prompts that differ little from a prompt, and are false of every scene of it."""

from collections.abc import Iterator
from functools import cache

from trajsurgery.tiny.prompt import Prompt, Thing, every_prompt
from trajsurgery.tiny.scene import COLOURS, SHAPES, SLOTS

Meaning = tuple[tuple[Thing, ...], str | None]
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _meaning(things: tuple[Thing, ...], relation: str | None) -> Meaning:
    """Return the meaning, the same for all ways of saying it."""
    if relation is None:
        return tuple(sorted(things, key=str)), None
    return (things[::-1], MIRROR[relation]) if relation in ("right of", "below") else (things, relation)


def _swaps(prompt: Prompt) -> Iterator[Meaning]:
    """Swap colours; swap the order. Without colours, or without a relation, one of them changes nothing."""
    if len(prompt.things) == 2:
        a, b = prompt.things
        yield _meaning((Thing(a.shape, b.colour), Thing(b.shape, a.colour)), prompt.relation)
        yield _meaning((b, a), prompt.relation)


def _counts(prompt: Prompt) -> Iterator[Meaning]:
    """Add or remove one object."""
    extra = [Thing(s, c) for s in SHAPES for c in (None, *COLOURS)]
    if len(prompt.things) < SLOTS:
        yield from (_meaning((*prompt.things, thing), None) for thing in extra)
    for i in range(len(prompt.things)):
        yield _meaning(prompt.things[:i] + prompt.things[i + 1 :], None)


def _changes(prompt: Prompt) -> Iterator[Meaning]:
    """Change the colour or the shape of one object, or of all where all are alike (three red circles)."""
    alike = len(set(prompt.things)) == 1
    for i, old in enumerate(prompt.things):
        colours = [] if old.colour is None else [Thing(old.shape, c) for c in COLOURS]
        for new in colours + [Thing(s, old.colour) for s in SHAPES]:
            if new != old:
                whole = (new,) * len(prompt.things)
                yield _meaning(whole if alike else (*prompt.things[:i], new, *prompt.things[i + 1 :]), prompt.relation)


@cache
def hard_negatives(prompt: Prompt) -> tuple[Prompt, ...]:
    """Return all prompts of the world that differ from this one by one change and can't be true together with it."""
    meanings = {*_swaps(prompt), *_counts(prompt), *_changes(prompt)} - {_meaning(prompt.things, prompt.relation)}
    return tuple(p for p in every_prompt() if _meaning(p.things, p.relation) in meanings)


@cache
def mistakes(prompt: Prompt) -> tuple[Prompt, ...]:
    """Return wrong captions for this prompt's scenes: its words with colours swapped, or another relation."""
    meaning = _meaning(prompt.things, prompt.relation)
    if prompt.relation is not None:
        wrong = {_meaning(prompt.things, relation) for relation in MIRROR} - {meaning}
    else:
        wrong = set(_swaps(prompt)) - {meaning}
    return tuple(p for p in every_prompt() if p.category == prompt.category and _meaning(p.things, p.relation) in wrong)
