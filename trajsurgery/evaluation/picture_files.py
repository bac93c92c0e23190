"""Read picture files as they are shown: upright, all bits scaled to [0, 1], and on white where they are transparent."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import RewardError

WHITE_16_BIT = 2**16 - 1


def read_picture(path: Path, device: torch.device) -> Tensor:
    """Read a picture as Float[1 3 h w] in [0, 1]; of an animated one the first frame.

    Raises:
        RewardError: PIL can't read it, or its values have no known range.
    """
    with _opened(path) as picture:
        pixels = _pixels(path, picture)
    return pixels.permute(2, 0, 1)[None].to(device)


def picture_remarks(paths: Sequence[Path]) -> list[str]:
    """Return lines about what is not scored as it is stored: transparent and animated pictures. Reads headers only.

    Raises:
        RewardError: PIL can't read one.
    """
    transparent, animated = list[str](), list[str]()
    for path in paths:
        with _opened(path) as picture:
            if picture.has_transparency_data:
                transparent.append(path.name)
            if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a photo and its preview
                animated.append(path.name)
    remarks = {"transparent, and scored on white": transparent, "animated, and scored by the first frame": animated}
    return [f"{_names(names)}: {remark}." for remark, names in remarks.items() if names]


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} further pictures"


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a damaged PNG is a SyntaxError
        raise RewardError(f"{path} is no picture that PIL can read ({error}).") from error


def _pixels(path: Path, picture: Any) -> Tensor:
    """Return Float[h w 3] in [0, 1]."""
    import numpy as np
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = torch.from_numpy(np.array(picture, dtype=np.int64))
        if bool((grey < 0).any()) or bool((grey > WHITE_16_BIT).any()):
            raise RewardError(f"{path} has values from {grey.min()} to {grey.max()}: pictures have 8 or 16 bits.")
        return (grey / WHITE_16_BIT)[..., None].expand(-1, -1, 3)
    if picture.mode == "F":
        raise RewardError(f"{path} holds floats, whose range is not known: save it with 8 or 16 bits.")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return torch.from_numpy(np.array(picture.convert("RGB"))) / 255
