"""Pictures as data URIs, small enough that a page with hundreds of them opens on a phone."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

TYPES = {".png": "image/png", ".webp": "image/webp", ".svg": "image/svg+xml"}
SIDE, FRAME_SIDE = 512, 256
"""Longest sides on a page, in pixels: of a sample, and of a picture in a row of several."""

EXACT = 128
"""Pictures with no longer side than this are embedded as they are."""

QUALITY = 85


def data_uri(path: Path, side: int = SIDE) -> str:
    """Return a picture as a data URI: its file if that is small or a drawing, else a WebP of at most `side` pixels.

    A video keeps its frames and their time. A damaged picture is embedded as it is: the browser shows its text instead.
    """
    content, kind = path.read_bytes(), TYPES[path.suffix]
    smaller = None if path.suffix == ".svg" else _as_webp(content, side)
    if smaller is not None and len(smaller) < len(content):
        content, kind = smaller, "image/webp"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _as_webp(content: bytes, side: int) -> bytes | None:
    """Return the picture as WebP; None if it stays as it is."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            if max(picture.size) <= EXACT:
                return None
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
            milliseconds = picture.info.get("duration", 0)
    except (UnidentifiedImageError, OSError):
        return None
    for frame in frames:
        frame.thumbnail((side, side))
    options: dict[str, Any] = {"format": "WEBP", "quality": QUALITY}
    if len(frames) > 1:
        options |= {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    buffer = io.BytesIO()
    frames[0].save(buffer, **options)
    return buffer.getvalue()
