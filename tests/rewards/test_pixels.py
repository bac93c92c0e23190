"""The shared preprocessing against PIL, which knows nothing of torch: values, corners, gradient."""

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
    """Noise, so that every weight of the filter counts, and its overshoots too."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height * width), dtype=dtype)


def by_pil(image: Tensor, height: int, width: int) -> Tensor:
    """PIL's resize of float pictures, channel by channel, in two clipped passes: what bytes get, but not rounded."""
    for size in ((width, image.shape[-2]), (width, height)):
        channels = [np.asarray(Image.fromarray(c.numpy()).resize(size, Image.Resampling.BICUBIC)) for c in image[0]]
        image = torch.from_numpy(np.stack(channels))[None].clamp(0, 1)
    return image


def near(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) <= VALUE[torch.float32] * float(wanted.norm())


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_resizing_is_pil_s_filter(size: tuple[int, int]) -> None:
    image = picture(*size)
    for height, width in ((SIDE, SIDE), (SIDE, 41), (9, SIDE)):
        assert near(pil_resize(image, height, width), by_pil(image, height, width))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_bytes_differ_by_pil_s_rounding_alone(size: tuple[int, int]) -> None:
    """Half a level after each of two passes; the second pass's weights sum to at most 1.3 in size.

    The passes are asked for one by one: Pillow 13 swaps them on tall pictures, earlier ones never did.
    """
    raw = (picture(*size) * 255).round().to(torch.uint8)
    small = Image.fromarray(raw[0].permute(1, 2, 0).numpy())
    for each in ((SIDE, size[0]), (SIDE, SIDE)):
        small = small.resize(each, Image.Resampling.BICUBIC)
    wanted = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float()
    assert float((pil_resize(raw.float() / 255, SIDE, SIDE) * 255 - wanted).abs().max()) < 0.5 * 1.3 + 0.5 + 0.01


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_whole_picture_is_fitted(size: tuple[int, int]) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    image = picture(*size)
    height, width = (max(round(n * SIDE / max(size)), 1) for n in size)
    wanted = torch.zeros(1, 3, SIDE, SIDE)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    small = resize(image, [height, width], InterpolationMode.BICUBIC, antialias=True)  # HPSv2's: on floats, not clipped
    wanted[..., top : top + height, left : left + width] = small
    assert near(resize_and_pad(image, SIDE), wanted)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_middle_is_cut_out_as_torchvision_does(size: tuple[int, int]) -> None:
    from torchvision.transforms.functional import center_crop, resize

    image = picture(*size)
    wanted = center_crop(by_pil(image, *resize(image, SIDE).shape[-2:]), [SIDE])
    assert near(resize_and_crop(image, SIDE, round_offset), wanted)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_middle_is_cut_out_as_transformers_does(size: tuple[int, int]) -> None:
    """transformers' own functions on arrays: the corner is rounded down, which differs on odd spare pixels."""
    from transformers.image_transforms import center_crop, get_resize_output_image_size

    image = picture(*size)
    height, width = get_resize_output_image_size(image[0].numpy(), SIDE, default_to_square=False)
    wanted = center_crop(by_pil(image, height, width)[0].numpy(), (SIDE, SIDE))
    assert near(resize_and_crop(image, SIDE, floor_offset), torch.from_numpy(wanted)[None])


def test_the_two_corners_differ() -> None:
    assert [floor_offset(n) for n in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [round_offset(n) for n in range(8)] == [0, 0, 1, 2, 2, 2, 3, 4]


def test_the_normalisation_is_clip_s() -> None:
    found = normalize(picture(4, 4))[0, :, 1, 2]
    wanted = (picture(4, 4)[0, :, 1, 2] - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(found, wanted)


@pytest.mark.parametrize("size", [(40, 40), (20, 50), (50, 21), (6, 5)])
@pytest.mark.parametrize(
    "way",
    [
        lambda x: resize_and_pad(x, SIDE),
        lambda x: resize_and_crop(x, SIDE, floor_offset),
        lambda x: resize_and_crop(x, SIDE, round_offset),
    ],
    ids=["fitted", "floored", "nearest"],
)
def test_the_gradient_agrees_with_finite_differences(way: Callable[[Tensor], Tensor], size: tuple[int, int]) -> None:
    image = (0.3 + 0.4 * picture(*size, torch.float64)).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((normalize(way(image)).sin() * weights).sum(), image)
    direction = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        ahead, back = ((normalize(way(image + s * 1e-5 * direction)).sin() * weights).sum() for s in (1, -1))
    analytic = float((gradient * direction).sum())
    assert abs(analytic - float(ahead - back) / 2e-5) <= STOCK * abs(analytic)


def test_a_picture_that_vanishes_is_named() -> None:
    with pytest.raises(RewardError, match="1 x 1000 are too narrow"):
        resize_and_pad(picture(1, 1000), SIDE)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_rounded_it_is_pil_s_bytes_level_for_level(size: tuple[int, int]) -> None:
    """The gradient is that of the passes that are not rounded."""
    raw = (picture(*size) * 255).round().to(torch.uint8)
    for height, width in ((SIDE, SIDE), (SIDE, 41), (9, SIDE)):
        small = Image.fromarray(raw[0].permute(1, 2, 0).numpy())
        for each in ((width, size[0]), (width, height)):
            small = small.resize(each, Image.Resampling.BICUBIC)
        given = (raw.float() / 255).requires_grad_()
        found = pil_resize(given, height, width, rounded=True)
        assert torch.equal((found[0] * 255).round().to(torch.uint8), torch.from_numpy(np.array(small)).permute(2, 0, 1))
        plain = pil_resize(given, height, width)
        assert float((found - plain).detach().abs().max()) * 255 < 1.7
        assert torch.equal(torch.autograd.grad(found.sum(), given)[0], torch.autograd.grad(plain.sum(), given)[0])
