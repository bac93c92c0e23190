"""The world's two tokenizers, built from its prompts: a word is a token. Nothing is downloaded."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from trajsurgery.tiny.pipe import TEXT_LENGTH
from trajsurgery.tiny.prompt import every_prompt


def words() -> list[str]:
    """Return every word of the world's prompts, sorted, and words that users are likely to add."""
    polite = ("an", "photo", "image", "picture", "of", "the", "to")
    return sorted({word for prompt in every_prompt() for word in prompt.text.split()} | set(polite))


def t5_tokenizer(folder: Path, vocabulary_words: Sequence[str] = (), longest: int = TEXT_LENGTH) -> Any:
    """Build a T5Tokenizer over `vocabulary_words` or `words()`, save it to the folder and load it."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in vocabulary_words or words()]
    made: Any = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=longest)
    made.save_pretrained(str(folder))
    return T5Tokenizer.from_pretrained(str(folder))


def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merge byte pairs until each word is one token; the last two numbers are CLIP's marks, the end the highest."""
    vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    vocabulary |= {f"{letter}</w>": len(vocabulary) + i for i, letter in enumerate(list(vocabulary))}
    split = {word: (*word[:-1], f"{word[-1]}</w>") for word in words()}
    merges: list[tuple[str, str]] = []
    while pairs := sorted({pair for parts in split.values() for pair in pairwise(parts)}):
        counts = {pair: sum(pair in pairwise(parts) for parts in split.values()) for pair in pairs}
        best = max(pairs, key=lambda pair: counts[pair])
        merges.append(best)
        vocabulary.setdefault("".join(best), len(vocabulary))
        split = {word: _merge(parts, best) for word, parts in split.items()}
    return vocabulary | {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}, merges


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] = merged[-1] + part
        else:
            merged.append(part)
    return tuple(merged)


def clip_tokenizer(folder: Path) -> Any:
    """Build a CLIPTokenizer for which each of `words()` is one token; save it to the folder and load it."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _byte_pairs()
    pairs: Any = merges  # the annotation says strings, the tokenizer takes pairs
    CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=TEXT_LENGTH).save_pretrained(str(folder))
    return CLIPTokenizer.from_pretrained(str(folder))
