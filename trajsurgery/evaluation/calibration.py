"""Calibration of a score against the rules: the share of images that the rules call right, by score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BINS = 8


def reliability(scores: Tensor, correct: Tensor, bins: int = BINS) -> dict[str, Any]:
    """Return the reliability curve of scores against verdicts as a dict; images without a finite score are left out.

    `bins` holds the curve, lowest scores first: quantile bins of about equal size (`from`, the least score; the mean
    `score`; the share `correct`; the number of `images`). `auc` is the probability that a right image scores above a
    wrong one, None if all verdicts agree; `slope` is the least-squares rise of the share by one unit of score.

    Args:
        scores: Float[images].
        correct: Bool[images].
    """
    finite = scores.isfinite()
    x, y = scores[finite].double(), correct[finite].double()
    if not len(x):
        return {"bins": [], "auc": None, "slope": None}
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    place = torch.bucketize(x, x.quantile(inner).unique(), right=True)
    parts = [(x[place == i], y[place == i]) for i in place.unique()]
    lines = [
        {"from": float(a.min()), "score": float(a.mean()), "correct": float(b.mean()), "images": len(a)}
        for a, b in parts
    ]
    return {"bins": lines, "auc": area(x, y.bool()), "slope": _slope(x, y)}


def area(scores: Tensor, correct: Tensor) -> float | None:
    """Return the area under the ROC curve: how often a right image scores above a wrong one, ties counted half."""
    right, wrong = scores[correct], scores[~correct]
    if not len(right) or not len(wrong):
        return None
    gaps = right[:, None] - wrong[None, :]
    return float(((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean())


def _slope(x: Tensor, y: Tensor) -> float | None:
    spread = float((x - x.mean()).square().sum())
    return float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else None


def expected(curve: Mapping[str, Any], scores: Tensor) -> float | None:
    """Return the share of right images that a curve predicts for other scores: each counts as its bin's share.

    Applied to tuned images with the untuned model's curve: if the rules find fewer, part of the reward was gained
    without becoming right.
    """
    finite = scores[scores.isfinite()].double()
    if not curve["bins"] or not len(finite):
        return None
    edges = torch.tensor([line["from"] for line in curve["bins"][1:]], dtype=torch.float64)
    shares = torch.tensor([line["correct"] for line in curve["bins"]], dtype=torch.float64)
    return float(shares[torch.bucketize(finite, edges, right=True)].mean())


def interval(share: float, count: int, z: float = 2.0) -> tuple[float, float]:
    """Return the Wilson interval of a share of `count` images, z standard errors wide on each side."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    # A share of 0 or 1 is an end of its own interval, which rounding must not put inside.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
