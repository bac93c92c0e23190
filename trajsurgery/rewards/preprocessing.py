"""Differentiable preprocessing: from images in [0, 1] of any size to a model's input, with the originals' own values.

Most originals resize byte images with PIL, which clips and rounds to 255 levels after each of its two passes
(`pil_resize`); HPSv2's resizes floats with torchvision, which does neither (`torchvision_resize`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trajsurgery.errors import RewardError
from trajsurgery.surgery.autograd_functions import connect

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's; the other rewards here have inherited them."""


def floor_offset(spare: int) -> int:
    """Return the corner of transformers' centre crop, when the larger side has `spare` pixels too many."""
    return spare // 2


def round_offset(spare: int) -> int:
    """Return the corner of torchvision's centre crop: one pixel further for every other odd number."""
    return round(spare / 2)


def resize_and_pad(images: Tensor, side: int) -> Tensor:
    """Resize the longer side to `side` and pad with black: Float[batch 3 side side].

    Floats are resized without rounding (`torchvision_resize`), as the original does.
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    images = torchvision_resize(images, round(height * scale), round(width * scale))
    above, left = (side - images.shape[-2]) // 2, (side - images.shape[-1]) // 2
    return functional.pad(images, (left, side - images.shape[-1] - left, above, side - images.shape[-2] - above))


def resize_and_crop(images: Tensor, side: int, corner: Callable[[int], int], rounded: bool = False) -> Tensor:
    """Resize the shorter side to `side` and crop the centre: Float[batch 3 side side].

    Args:
        corner: `floor_offset` or `round_offset`: where libraries put the centre of an odd number of pixels.
        rounded: see `pil_resize`.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    images = pil_resize(
        images, *(side if n == short else int(side * n / short) for n in (height, width)), rounded=rounded
    )
    above, left = (corner(n - side) for n in images.shape[-2:])
    return images[..., above : above + side, left : left + side]


def pil_resize(images: Tensor, height: int, width: int, rounded: bool = False) -> Tensor:
    """PIL's bicubic resize: antialiased, along the width, then along the height, clipped to [0, 1] after each as bytes
    are.

    One clip at the end, as torchvision does on tensors, differs by up to ten levels of 255 on noise. Pillow 13 begins
    with the height if a picture is tall; the Pillow versions of the models' time did not.

    Args:
        rounded: return PIL's values of the same pictures as bytes, level for level; the gradient ignores the rounding.
            The values differ by at most 1.7 levels of 255.

    Raises:
        RewardError: a side would have no pixel left.
    """
    real = images
    if (height, width) != tuple(images.shape[-2:]):
        for size in ((images.shape[-2], width), (height, width)):
            images = torchvision_resize(images, *size).clamp(0, 1)
    if not rounded:
        return images
    pixels = (real.detach() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
    levels = torch.stack([_resize_bytes(picture, height, width) for picture in pixels])
    return connect(images, (levels.double() / 255).to(images))


def _resize_bytes(picture: Tensor, height: int, width: int) -> Tensor:
    """PIL's bicubic resize of uint8 [3 h w], the width first."""
    from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image

    image = to_pil_image(picture)
    for size in ((image.height, width), (height, width)):
        image = resize(image, list(size), InterpolationMode.BICUBIC)
    return pil_to_tensor(image)


def torchvision_resize(images: Tensor, height: int, width: int) -> Tensor:
    """torchvision's bicubic resize of floats: antialiased in one go, without clipping.

    Raises:
        RewardError: a side would have no pixel left.
    """
    if not height or not width:
        raise RewardError(
            f"images of {images.shape[-2]} x {images.shape[-1]} are too narrow: resized to {height} x {width} there is "
            "nothing left of them."
        )
    if (height, width) == tuple(images.shape[-2:]):
        return images
    return functional.interpolate(images, (height, width), mode="bicubic", antialias=True)


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """(images - mean) / std, channel by channel."""
    centre, spread = (torch.tensor(values).to(images).view(3, 1, 1) for values in (mean, std))
    return (images - centre) / spread
