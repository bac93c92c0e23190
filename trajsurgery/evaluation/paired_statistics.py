"""Before against after: paired differences of two evaluations with the same prompts and noise. Reads records only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajsurgery.evaluation.calibration import expected, reliability
from trajsurgery.evaluation.held_out import Scores


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
    everything = torch.ones(len(before.texts), dtype=torch.bool)
    found: dict[str, Any] = {"kind": "evaluation", **_figures(everything, before, after)}
    names = [name for name in before.metrics if name in after.metrics]
    found["metrics"] = {
        name: _named("reward", paired(before.metrics[name], after.metrics[name], before.texts)) for name in names
    }
    if before.correct is not None and after.correct is not None:
        found |= _calibrated((before.reward, before.correct), (after.reward, after.correct))
        for name, line in found["metrics"].items():
            line |= _calibrated((before.metrics[name], before.correct), (after.metrics[name], after.correct))
    found["diversity"] = {
        name: line for name in before.apart if (line := _diversity(name, everything, before, after)) is not None
    }
    return found | {"categories": {c: _category(c, before, after) for c in dict.fromkeys(before.categories)}}


def _figures(rows: Tensor, before: Scores, after: Scores) -> dict[str, Any]:
    """Reward, rules and junk of some of the images."""
    texts = _texts(rows, before)
    found: dict[str, Any] = {
        "images": len(texts),
        **_named("reward", paired(before.reward[rows], after.reward[rows], texts)),
    }
    if before.correct is not None and after.correct is not None:
        found |= _named("rule", paired(before.correct[rows], after.correct[rows], texts))
    if before.junk is not None and after.junk is not None:
        found |= _named("junk", paired(before.junk[rows], after.junk[rows], texts))
    return found


def _texts(rows: Tensor, scores: Scores) -> tuple[str, ...]:
    return tuple(text for text, kept in zip(scores.texts, rows.tolist()) if kept)


def _category(category: str, before: Scores, after: Scores) -> dict[str, Any]:
    rows = torch.tensor([c == category for c in before.categories])
    found = {**_figures(rows, before, after), "prompts": len(set(_texts(rows, before)))}
    apart = _diversity("pixels", rows, before, after) or {}
    return found | {name: value for name, value in apart.items() if name.startswith("diversity")}


def _diversity(name: str, rows: Tensor, before: Scores, after: Scores) -> dict[str, Any] | None:
    """The mean distance between images of one prompt, over the images that have another of their prompt.

    Images of a prompt share their distances, so that the standard error is the one by prompt.
    """
    if name not in before.apart or name not in after.apart:
        return None
    a, b = before.apart[name], after.apart[name]
    kept = rows & ~a.isnan() & ~b.isnan()
    if not bool(kept.any()):
        return None
    texts = _texts(kept, before)
    found = _named("diversity", paired(a[kept], b[kept], texts))
    return {
        "images": len(texts),
        "prompts": len(set(texts)),
        **found,
        "diversity_gain_se": found["diversity_gain_se_by_prompt"],
    }


def _calibrated(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The reliability curves of (scores, verdicts), and the share of right images that the first one promises after."""
    curves = {"before": reliability(*before), "after": reliability(*after)}
    return {"calibration": curves, "rule_expected": expected(curves["before"], after[0])}


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
