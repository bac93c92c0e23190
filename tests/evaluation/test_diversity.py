"""Diversity: the mean pairwise distance of the images of one prompt, against a loop over pairs."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from trajsurgery.evaluation.diversity import Distance, angle, difference, distance_to_others, downscaled

TEXTS = ["a", "b", "a", "c", "b", "a"]


def pairwise(rows: Tensor, text: str, distance: Distance) -> float:
    """The mean over pairs of different images of a prompt."""
    indices = [i for i, other in enumerate(TEXTS) if other == text]
    gaps = [float(distance(rows[[i]], rows[[j]])) for i, j in combinations(indices, 2)]
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("distance", [difference, angle])
def test_the_mean_over_a_prompt_is_the_mean_over_pairs(distance: Distance) -> None:
    rows = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    distances = distance_to_others(rows, TEXTS, distance)
    for text in "ab":
        indices = [i for i, other in enumerate(TEXTS) if other == text]
        assert float(distances[indices].mean()) == pytest.approx(pairwise(rows, text, distance), rel=1e-5)
    assert distances.isnan().tolist() == [text == "c" for text in TEXTS], "a single image has no others"


def test_distances_have_the_documented_scale() -> None:
    black, white = torch.zeros(1, 12), torch.ones(1, 12)
    assert float(difference(black, white)) == 1
    assert float(difference(white, white)) == 0
    assert float(angle(white, 3 * white)) == pytest.approx(0, abs=1e-6)
    assert float(angle(white, -white)) == pytest.approx(2)


def test_a_collapsed_model_has_no_diversity() -> None:
    image = torch.rand(1, 12)
    distances = distance_to_others(image.expand(6, 12), TEXTS, difference)
    assert distances[~distances.isnan()].max() == 0


def test_large_images_are_downscaled_and_small_ones_are_not() -> None:
    images = torch.rand(2, 3, 128, 96)
    assert downscaled(images).shape == (2, 3 * 64 * 64)
    assert downscaled(images).mean() == pytest.approx(float(images.mean()), abs=1e-3)
    assert torch.equal(downscaled(images[..., :32, :32]), images[..., :32, :32].flatten(1))
    assert downscaled(torch.rand(2, 3, 5, 128, 128)).shape == (2, 3 * 5 * 64 * 64)
