"""Compare two evaluations of the same prompts and noise: paired differences with standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trajsurgery.evaluation.calibration import expected, reliability

if TYPE_CHECKING:
    from trajsurgery.evaluation.held_out import HeldOutScores

COLUMNS = {"reward": "reward", "rule": "correct", "junk": "junk"}
"""Names in the records of the fields of `HeldOutScores` that are compared for each category."""


@dataclass(frozen=True)
class Gain:
    """A mean before and after, and their paired difference with standard errors."""

    before: float
    after: float
    gain: float
    se: float
    """Of the gain, over images."""
    se_by_prompt: float
    """Of the gain, over prompts: the differences of a prompt's images are averaged first (clusters)."""


def paired(before: Tensor, after: Tensor, clusters: tuple[str, ...]) -> Gain:
    """Compare two [n] tensors in pairs, without the pairs in which one is not finite.

    Standard errors are NaN for fewer than two images (or prompts).

    Args:
        clusters: n names; differences that share a name are not independent.
    """
    finite = before.isfinite() & after.isfinite()
    a, b = before[finite].double(), after[finite].double()
    clusters = tuple(name for name, kept in zip(clusters, finite.tolist()) if kept)
    d = b - a
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    of = torch.tensor([names[name] for name in clusters])
    residuals = torch.zeros(len(names), dtype=torch.float64).index_add(0, of, d - d.mean())
    g = len(names)
    by_prompt = math.sqrt(g / (g - 1) * float(residuals.square().sum())) / len(d) if g > 1 else math.nan
    se = float(d.std()) / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return Gain(float(a.mean()), float(b.mean()), float(d.mean()), se, by_prompt)


def mean_gain(values: Tensor, clusters: tuple[str, ...]) -> Gain:
    """Return a mean with its standard errors, as a gain over zero."""
    return paired(torch.zeros_like(values), values, clusters)


def compare(before: HeldOutScores, after: HeldOutScores) -> dict[str, Any]:
    """Return the evaluation's line of metrics.jsonl, without its `seconds`.

    Raises:
        ValueError: the two are not of the same prompts.
    """
    if before.texts != after.texts:
        raise ValueError(
            "before and after are paired image by image: they must be of the same prompts in the same order."
        )
    everything = torch.ones(len(before.texts), dtype=torch.bool)
    record: dict[str, Any] = {"kind": "evaluation", **_figures(everything, before, after)}
    record["metrics"] = {
        name: _named("reward", paired(scores, after.metrics[name], before.texts))
        for name, scores in before.metrics.items()
        if name in after.metrics
    }
    record["not_finite"] = _count_not_finite(before, after)
    if before.correct is not None and after.correct is not None:
        record |= _calibrated((before.reward, before.correct), (after.reward, after.correct))
        for name, figures in record["metrics"].items():
            figures |= _calibrated((before.metrics[name], before.correct), (after.metrics[name], after.correct))
    record["diversity"] = {
        name: figures for name in before.apart if (figures := _diversity(name, everything, before, after)) is not None
    }
    return record | {"categories": {c: _category(c, before, after) for c in dict.fromkeys(before.categories)}}


def _figures(rows: Tensor, before: HeldOutScores, after: HeldOutScores) -> dict[str, Any]:
    """Return the gains in reward, rules and junk for some of the images."""
    texts = tuple(compress(before.texts, rows.tolist()))
    columns = {name: (getattr(before, field), getattr(after, field)) for name, field in COLUMNS.items()}
    figures: dict[str, Any] = {"images": len(texts), "prompts": len(set(texts))}
    for name, (a, b) in columns.items():
        figures |= {} if a is None or b is None else _named(name, paired(a[rows], b[rows], texts))
    return figures


def _category(category: str, before: HeldOutScores, after: HeldOutScores) -> dict[str, Any]:
    rows = torch.tensor([c == category for c in before.categories])
    return {**(_diversity("pixels", rows, before, after) or {}), **_figures(rows, before, after)}


def _diversity(name: str, rows: Tensor, before: HeldOutScores, after: HeldOutScores) -> dict[str, Any] | None:
    """Return the mean distance between images of one prompt, over the images that share their prompt with another.

    Images of a prompt share their distances, so the standard error is the one by prompt.
    """
    if name not in before.apart or name not in after.apart:
        return None
    a, b = before.apart[name], after.apart[name]
    selected = rows & ~a.isnan() & ~b.isnan()
    if not bool(selected.any()):
        return None
    texts = tuple(compress(before.texts, selected.tolist()))
    figures = _named("diversity", paired(a[selected], b[selected], texts))
    figures["diversity_gain_se"] = figures["diversity_gain_se_by_prompt"]
    return {"images": len(texts), "prompts": len(set(texts)), **figures}


def _count_not_finite(before: HeldOutScores, after: HeldOutScores) -> dict[str, list[int]]:
    """Return, for each scorer with scores that are not finite, how many before and after."""
    pairs = {"reward": (before.reward, after.reward)}
    pairs |= {name: (before.metrics[name], after.metrics[name]) for name in before.metrics if name in after.metrics}
    counts = {name: [int((~scores.isfinite()).sum()) for scores in pair] for name, pair in pairs.items()}
    return {name: pair for name, pair in counts.items() if any(pair)}


def _calibrated(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return the reliability curves of (scores, verdicts), and the share of right images that the first one expects."""
    curves = {"before": reliability(*before), "after": reliability(*after)}
    return {"calibration": curves, "rule_expected": expected(curves["before"], after[0])}


def _named(name: str, gain: Gain) -> dict[str, float]:
    figures = {"before": gain.before, "after": gain.after, "gain": gain.gain}
    errors = {"gain_se": gain.se, "gain_se_by_prompt": gain.se_by_prompt}
    return {f"{name}_{figure}": value for figure, value in (figures | errors).items()}


def in_standard_errors(evaluation: Mapping[str, Any], name: str = "reward") -> float:
    """Return a gain in units of its paired standard error; NaN if that is 0 or undefined."""
    return float(evaluation[f"{name}_gain"]) / (evaluation[f"{name}_gain_se"] or math.nan)
