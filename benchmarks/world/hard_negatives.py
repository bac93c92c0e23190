"""Hard negatives: prompts that say nearly what a given prompt says, and are false of every scene of it."""

from collections.abc import Iterator
from functools import cache

from trajsurgery.tiny.prompt import Prompt, Thing, every_prompt
from trajsurgery.tiny.scene import COLOURS, SHAPES, SLOTS

Meaning = tuple[tuple[Thing, ...], str | None]
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _meaning(things: tuple[Thing, ...], relation: str | None) -> Meaning:
    """What is meant, the same for all ways of saying it."""
    if relation is None:
        return tuple(sorted(things, key=str)), None
    return (things[::-1], MIRROR[relation]) if relation in ("right of", "below") else (things, relation)


def _swaps(prompt: Prompt) -> Iterator[Meaning]:
    """Colours swapped; order swapped. Without colours, or without a relation, the one or the other changes nothing."""
    if len(prompt.things) == 2:
        a, b = prompt.things
        yield _meaning((Thing(a.shape, b.colour), Thing(b.shape, a.colour)), prompt.relation)
        yield _meaning((b, a), prompt.relation)


def _counts(prompt: Prompt) -> Iterator[Meaning]:
    """One object more or less."""
    extra = [Thing(s, c) for s in SHAPES for c in (None, *COLOURS)]
    if len(prompt.things) < SLOTS:
        yield from (_meaning((*prompt.things, thing), None) for thing in extra)
    for i in range(len(prompt.things)):
        yield _meaning(prompt.things[:i] + prompt.things[i + 1 :], None)


def _changes(prompt: Prompt) -> Iterator[Meaning]:
    """All of one kind (three red circles), or one object, with another colour or another shape."""
    alike = len(set(prompt.things)) == 1
    for i, old in enumerate(prompt.things):
        colours = [] if old.colour is None else [Thing(old.shape, c) for c in COLOURS]
        for new in colours + [Thing(s, old.colour) for s in SHAPES]:
            if new != old:
                whole = (new,) * len(prompt.things)
                yield _meaning(whole if alike else (*prompt.things[:i], new, *prompt.things[i + 1 :]), prompt.relation)


@cache
def hard_negatives(prompt: Prompt) -> tuple[Prompt, ...]:
    """All prompts of the world that differ from this one by one change and can't be true together with it."""
    meanings = {*_swaps(prompt), *_counts(prompt), *_changes(prompt)} - {_meaning(prompt.things, prompt.relation)}
    return tuple(p for p in every_prompt() if _meaning(p.things, p.relation) in meanings)


@cache
def mistakes(prompt: Prompt) -> tuple[Prompt, ...]:
    """Wrong captions for the scenes of this prompt: its words with the colours swapped, or with another relation."""
    own = _meaning(prompt.things, prompt.relation)
    if prompt.relation is not None:
        wrong = {_meaning(prompt.things, relation) for relation in MIRROR} - {own}
    else:
        wrong = set(_swaps(prompt)) - {own}
    return tuple(p for p in every_prompt() if p.category == prompt.category and _meaning(p.things, p.relation) in wrong)
