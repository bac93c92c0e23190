"""The reliability curve, its area and slope, against their definitions and exact values."""

from __future__ import annotations

import math

import pytest
import torch

from trajsurgery.evaluation.calibration import area, expected, interval, reliability


def draw(count: int = 4000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in [0, 1], each the probability that its image is correct."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, generator=generator)
    return scores, torch.rand(count, generator=generator) < scores


def test_scores_that_are_probabilities_lie_on_the_diagonal() -> None:
    curve = reliability(*draw())
    assert [line["images"] for line in curve["bins"]] == [500] * 8
    for line in curve["bins"]:
        low, high = interval(line["correct"], line["images"], 3.5)
        assert low < line["score"] < high
    assert curve["slope"] == pytest.approx(1, abs=0.06)
    assert curve["auc"] == pytest.approx(5 / 6, abs=0.02)  # P(a > b) of densities 2x and 2 - 2x


def test_bins_are_the_quantiles_and_cover_all_images_once() -> None:
    scores, correct = torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([True, False, False, True])
    curve = reliability(scores, correct, bins=2)
    assert curve["bins"] == [
        {"from": 1.0, "score": 1.5, "correct": 0.0, "images": 2},
        {"from": 3.0, "score": 3.5, "correct": 1.0, "images": 2},
    ]
    assert curve["auc"] == 1
    assert curve["slope"] == pytest.approx(0.4)  # cov = 0.5, var = 1.25


def test_ties_share_a_bin_and_count_half() -> None:
    scores = torch.tensor([0.0] * 6 + [1.0] * 4)
    correct = torch.tensor([True, False] * 5)
    curve = reliability(scores, correct)
    assert [line["images"] for line in curve["bins"]] == [6, 4]
    assert area(scores, correct) == pytest.approx(0.5)


def test_degenerate_scores_have_no_area_slope_or_bins() -> None:
    scores = torch.tensor([0.1, math.nan, 0.3])
    assert reliability(scores, torch.tensor([True] * 3))["auc"] is None
    assert sum(line["images"] for line in reliability(scores, torch.tensor([True] * 3))["bins"]) == 2
    assert reliability(torch.full((3,), 0.2), torch.tensor([True, False, True]))["slope"] is None
    empty = reliability(torch.full((3,), math.nan), torch.tensor([True] * 3))
    assert empty == {"bins": [], "auc": None, "slope": None}
    assert expected(empty, scores) is None


def test_the_curve_predicts_the_mean_of_its_own_images() -> None:
    scores, correct = draw(300)
    curve = reliability(scores, correct)
    assert expected(curve, scores) == pytest.approx(float(correct.double().mean()), abs=1e-12)
    assert expected(curve, torch.full((5,), 9.0)) == pytest.approx(curve["bins"][-1]["correct"])
    assert expected(curve, torch.full((5,), -9.0)) == pytest.approx(curve["bins"][0]["correct"])


def test_a_calibrated_gain_is_predicted_and_a_hacked_one_overestimated() -> None:
    scores, correct = draw()
    better, right = draw(seed=1)
    better, right = better.sqrt(), torch.rand(4000, generator=torch.Generator().manual_seed(2)) < better.sqrt()
    predicted = expected(reliability(scores, correct), better)
    assert predicted == pytest.approx(float(right.double().mean()), abs=0.03)
    hacked = expected(reliability(scores, correct), (scores + 0.5).clamp(max=1))
    assert hacked is not None
    assert hacked > float(correct.double().mean()) + 0.2


def test_the_interval_is_wilson_s() -> None:
    low, high = interval(0.5, 100, 2.0)
    assert (low, high) == (pytest.approx(0.5 - 0.0981, abs=1e-4), pytest.approx(0.5 + 0.0981, abs=1e-4))
    for share, count in ((0.0, 60), (1.0, 60), (0.3, 20)):
        low, high = interval(share, count, 2.0)
        for end in (low, high):
            if 0 < end < 1:  # the ends are where the share is two standard errors off
                assert abs(share - end) == pytest.approx(2 * math.sqrt(end * (1 - end) / count), rel=1e-9)
