"""Before against after: paired differences of two evaluations with the same prompts and noise. Reads records only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajsurgery.heldout import Scores


@dataclass(frozen=True)
class Gain:
    """A mean before and after, and their paired difference with its standard errors."""

    before: float
    after: float
    gain: float
    se: float
    """Of the gain, over images."""
    se_by_prompt: float
    """Of the gain, over prompts: the differences of a prompt's images are averaged first (clusters)."""


def paired(before: Tensor, after: Tensor, clusters: tuple[str, ...]) -> Gain:
    """The paired comparison of two [n] tensors; NaN standard errors for fewer than two images (or prompts).

    Args:
        clusters: n names; the differences that share a name are not independent.
    """
    a, b = before.double(), after.double()
    d = b - a
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    of = torch.tensor([names[name] for name in clusters])
    residuals = torch.zeros(len(names), dtype=torch.float64).index_add(0, of, d - d.mean())
    g = len(names)
    by_prompt = math.sqrt(g / (g - 1) * float(residuals.square().sum())) / len(d) if g > 1 else math.nan
    se = float(d.std()) / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return Gain(float(a.mean()), float(b.mean()), float(d.mean()), se, by_prompt)


def compare(before: Scores, after: Scores) -> dict[str, Any]:
    """The evaluation's line of metrics.jsonl, without its `seconds`.

    Raises:
        ValueError: the two are not of the same prompts.
    """
    if before.texts != after.texts:
        raise ValueError(
            "before and after are paired image by image: they must be of the same prompts in the same order."
        )
    found: dict[str, Any] = {"kind": "evaluation", "images": len(before.texts)}
    found |= _named("reward", paired(before.reward, after.reward, before.texts))
    if before.correct is not None and after.correct is not None:
        found |= _named("rule", paired(before.correct, after.correct, before.texts))
    if before.junk is not None and after.junk is not None:
        found |= _named("junk", paired(before.junk, after.junk, before.texts))
    return found | {"categories": {c: _category(c, before, after) for c in dict.fromkeys(before.categories)}}


def _category(category: str, before: Scores, after: Scores) -> dict[str, Any]:
    rows = torch.tensor([c == category for c in before.categories])
    texts = tuple(text for text, c in zip(before.texts, before.categories) if c == category)
    found: dict[str, Any] = {"images": int(rows.sum()), "prompts": len(set(texts))}
    found |= _named("reward", paired(before.reward[rows], after.reward[rows], texts))
    if before.correct is not None and after.correct is not None:
        found |= _named("rule", paired(before.correct[rows], after.correct[rows], texts))
    return found


def _named(name: str, gain: Gain) -> dict[str, float]:
    return {
        f"{name}_before": gain.before,
        f"{name}_after": gain.after,
        f"{name}_gain": gain.gain,
        f"{name}_gain_se": gain.se,
        f"{name}_gain_se_by_prompt": gain.se_by_prompt,
    }


def in_standard_errors(evaluation: Mapping[str, Any], name: str = "reward") -> float:
    """A gain in its own paired standard errors."""
    se = evaluation[f"{name}_gain_se"] or math.nan
    return float(evaluation[f"{name}_gain"]) / se
