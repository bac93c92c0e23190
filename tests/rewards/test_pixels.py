"""The shared preprocessing against PIL: values, crop corners, gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tolerances import STOCK, VALUE
from trajsurgery import RewardError
from trajsurgery.rewards.preprocessing import (
    MEAN,
    STD,
    floor_offset,
    normalize,
    pil_resize,
    resize_and_crop,
    resize_and_pad,
    round_offset,
)

SIZES = {
    "square": (64, 64),
    "the model's": (28, 28),
    "wide": (45, 160),
    "tall": (121, 50),
    "odd": (61, 89),
    "tiny": (3, 5),
    "one pixel": (1, 1),
    "huge": (900, 1217),
}
SIDE = 28


def picture(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return noise, which uses every weight of the filter and its overshoots."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * width), dtype=dtype)


def by_pil(image: Tensor, height: int, width: int) -> Tensor:
    """PIL's resize of float images by channel in two clipped passes: as for bytes, but not rounded."""
    for size in ((width, image.shape[-2]), (width, height)):
        channels = [np.asarray(Image.fromarray(c.numpy()).resize(size, Image.Resampling.BICUBIC)) for c in image[0]]
        image = torch.from_numpy(np.stack(channels))[None].clamp(0, 1)
    return image


def near(actual: Tensor, expected: Tensor) -> bool:
    return float((actual - expected).norm()) <= VALUE[torch.float32] * float(expected.norm())


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_resizing_is_pil_s_filter(size: tuple[int, int]) -> None:
    image = picture(*size)
    for height, width in ((SIDE, SIDE), (SIDE, 41), (9, SIDE)):
        assert near(pil_resize(image, height, width), by_pil(image, height, width))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_bytes_differ_only_by_pil_s_rounding(size: tuple[int, int]) -> None:
    """Each of two passes rounds by up to half a level; the absolute weights of the second sum to at most 1.3.

    The passes are called one by one: Pillow 13 swaps them for tall images, earlier versions don't.
    """
    raw = (picture(*size) * 255).round().to(torch.uint8)
    small = Image.fromarray(raw[0].permute(1, 2, 0).numpy())
    for each in ((SIDE, size[0]), (SIDE, SIDE)):
        small = small.resize(each, Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float()
    assert float((pil_resize(raw.float() / 255, SIDE, SIDE) * 255 - expected).abs().max()) < 0.5 * 1.3 + 0.5 + 0.01


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_whole_image_is_fitted(size: tuple[int, int]) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    image = picture(*size)
    height, width = (max(round(n * SIDE / max(size)), 1) for n in size)
    expected = torch.zeros(1, 3, SIDE, SIDE)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    small = resize(image, [height, width], InterpolationMode.BICUBIC, antialias=True)  # HPSv2's: on floats, not clipped
    expected[..., top : top + height, left : left + width] = small
    assert near(resize_and_pad(image, SIDE), expected)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_crop_is_torchvision_s_center_crop(size: tuple[int, int]) -> None:
    from torchvision.transforms.functional import center_crop, resize

    image = picture(*size)
    expected = center_crop(by_pil(image, *resize(image, SIDE).shape[-2:]), [SIDE])
    assert near(resize_and_crop(image, SIDE, round_offset), expected)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_crop_is_transformers_center_crop(size: tuple[int, int]) -> None:
    """transformers' functions on arrays round the corner down, which differs for odd margins."""
    from transformers.image_transforms import center_crop, get_resize_output_image_size

    image = picture(*size)
    height, width = get_resize_output_image_size(image[0].numpy(), SIDE, default_to_square=False)
    expected = center_crop(by_pil(image, height, width)[0].numpy(), (SIDE, SIDE))
    assert near(resize_and_crop(image, SIDE, floor_offset), torch.from_numpy(expected)[None])


def test_the_two_roundings_of_the_corner_differ() -> None:
    assert [floor_offset(n) for n in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [round_offset(n) for n in range(8)] == [0, 0, 1, 2, 2, 2, 3, 4]


def test_the_normalisation_is_clip_s() -> None:
    pixels = normalize(picture(4, 4))[0, :, 1, 2]
    expected = (picture(4, 4)[0, :, 1, 2] - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(pixels, expected)


@pytest.mark.parametrize("size", [(40, 40), (20, 50), (50, 21), (6, 5)])
@pytest.mark.parametrize(
    "preprocess",
    [
        lambda x: resize_and_pad(x, SIDE),
        lambda x: resize_and_crop(x, SIDE, floor_offset),
        lambda x: resize_and_crop(x, SIDE, round_offset),
    ],
    ids=["fitted", "floored", "nearest"],
)
def test_the_gradient_agrees_with_finite_differences(
    preprocess: Callable[[Tensor], Tensor], size: tuple[int, int]
) -> None:
    image = (0.3 + 0.4 * picture(*size, torch.float64)).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((normalize(preprocess(image)).sin() * weights).sum(), image)
    direction = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        ahead, back = ((normalize(preprocess(image + s * 1e-5 * direction)).sin() * weights).sum() for s in (1, -1))
    analytic = float((gradient * direction).sum())
    assert abs(analytic - float(ahead - back) / 2e-5) <= STOCK * abs(analytic)


def test_an_image_that_vanishes_is_refused() -> None:
    with pytest.raises(RewardError, match="1 x 1000 are too narrow"):
        resize_and_pad(picture(1, 1000), SIDE)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_rounded_resizing_gives_pil_s_bytes(size: tuple[int, int]) -> None:
    """The gradient is that of the resize without rounding."""
    raw = (picture(*size) * 255).round().to(torch.uint8)
    for height, width in ((SIDE, SIDE), (SIDE, 41), (9, SIDE)):
        small = Image.fromarray(raw[0].permute(1, 2, 0).numpy())
        for each in ((width, size[0]), (width, height)):
            small = small.resize(each, Image.Resampling.BICUBIC)
        pixels = (raw.float() / 255).requires_grad_()
        rounded = pil_resize(pixels, height, width, rounded=True)
        assert torch.equal(
            (rounded[0] * 255).round().to(torch.uint8), torch.from_numpy(np.array(small)).permute(2, 0, 1)
        )
        plain = pil_resize(pixels, height, width)
        assert float((rounded - plain).detach().abs().max()) * 255 < 1.7
        assert torch.equal(torch.autograd.grad(rounded.sum(), pixels)[0], torch.autograd.grad(plain.sum(), pixels)[0])
