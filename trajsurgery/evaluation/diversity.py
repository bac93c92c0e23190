"""Diversity: how far apart the images of one prompt are. A model that always draws the same picture has collapsed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 64
"""Larger images are averaged down to this side before their pixels are compared."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""distance(a [n d], b [n d]) -> [n n], all pairs."""


def downscaled(images: Tensor) -> Tensor:
    """Return images or videos [batch ... h w] as rows of pixels [batch d], averaged down to at most SIDE x SIDE."""
    h, w = images.shape[-2:]
    planes = images.flatten(1, -3)
    if max(h, w) > SIDE:
        planes = functional.adaptive_avg_pool2d(planes, (min(h, SIDE), min(w, SIDE)))
    return planes.flatten(1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Return the root mean square difference of rows: 0 for equal images, 1 for black against white."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(a.shape[-1])


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 - cosine of rows, in [0, 2]."""
    return 1 - functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T


def distance_to_others(rows: Tensor, texts: Sequence[str], distance: Distance) -> Tensor:
    """Return Float[images]: the mean distance of each image to the others of its prompt; NaN for an image without
    others.

    The mean over a prompt's images is the prompt's mean pairwise distance.

    Args:
        rows: [images d].
        texts: the images' prompts.
    """
    distances = torch.full((len(rows),), math.nan)
    for text in dict.fromkeys(texts):
        places = torch.tensor([i for i, other in enumerate(texts) if other == text])
        if len(places) > 1:
            gaps = distance(rows[places], rows[places]).fill_diagonal_(0)
            distances[places] = gaps.sum(1) / (len(places) - 1)
    return distances
