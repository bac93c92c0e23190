"""Pictures of a run as files, and as small data URIs on a page."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trajsurgery.evaluation.held_out import HeldOutScores
from trajsurgery.runs.reports.embedded_pictures import data_uri
from trajsurgery.runs.reports.saved_pictures import save_picture, save_samples, save_sheet


def scores(pictures: torch.Tensor) -> HeldOutScores:
    n = len(pictures)
    return HeldOutScores(("a",) * n, ("all",) * n, torch.linspace(0, 1, n), None, None, pictures)


def test_pictures_are_saved_as_they_are_and_videos_move(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 8, 12), generator=generator, dtype=torch.uint8)
    videos = torch.randint(256, (2, 5, 3, 8, 12), generator=generator, dtype=torch.uint8)
    save_samples(tmp_path / "images", scores(images), scores(images.flip(0)))
    with Image.open(tmp_path / "images/samples/after/000.png") as picture:
        assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), images[1])
    save_samples(tmp_path / "videos", scores(videos), scores(videos))
    with Image.open(tmp_path / "videos/samples/before/001.webp") as film:
        assert film.n_frames == 5  # pyright: ignore[reportAttributeAccessIssue]
    entries = json.loads((tmp_path / "videos/samples/samples.json").read_text())
    assert [entry["before"]["file"] for entry in entries] == ["before/000.webp", "before/001.webp"]


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    large = scores(torch.zeros(1, 3, 600, 1200, dtype=torch.uint8))
    save_samples(tmp_path, large, large)
    with Image.open(tmp_path / "samples/after/000.png") as picture:
        assert picture.size == (512, 256)


def test_scores_that_are_not_finite_are_null_in_the_files(tmp_path: Path) -> None:
    held_out = replace(scores(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), reward=torch.tensor([math.nan, 1.0]))
    save_samples(tmp_path, held_out, held_out)
    save_sheet(tmp_path, 7, held_out, {"nested once": math.inf})
    entries = json.loads((tmp_path / "samples/samples.json").read_text())
    assert [entry["after"]["reward"] for entry in entries] == [None, 1.0]
    sheet = json.loads((tmp_path / "sheets/000007/sheet.json").read_text())
    assert (sheet["rewards"], sheet["terms"]) == ([None, 1.0], {"nested once": None})


def embedded(path: Path, side: int) -> tuple[str, bytes]:
    """Type and content of a picture on the page."""
    head, content = data_uri(path, side).split(";base64,")
    return head, base64.b64decode(content)


def test_small_pictures_drawings_and_damaged_ones_are_embedded_as_they_are(tmp_path: Path) -> None:
    noise = torch.randint(256, (3, 128, 100), dtype=torch.uint8)
    small = save_picture(noise, tmp_path / "small")
    assert embedded(small, 64) == ("data:image/png", small.read_bytes())
    for name, kind, content in (("a.svg", "image/svg+xml", b"<svg/>"), ("torn.png", "image/png", b"torn")):
        (tmp_path / name).write_bytes(content)
        assert embedded(tmp_path / name, 64) == (f"data:{kind}", content)


@pytest.mark.parametrize("frames", [1, 5])
def test_large_pictures_are_embedded_as_small_webp(tmp_path: Path, frames: int) -> None:
    """A page of a run on 1024 px holds some 200 pictures: as PNG of 512 px they'd be 80 MB."""
    noise = torch.rand(frames, 3, 6, 12, generator=torch.Generator().manual_seed(0))
    smooth = (255 * torch.nn.functional.interpolate(noise, scale_factor=50, mode="bilinear")).to(torch.uint8)
    path = save_picture(smooth if frames > 1 else smooth[0], tmp_path / "large")
    kind, content = embedded(path, 256)
    assert kind == "data:image/webp"
    assert len(content) < path.stat().st_size / 3
    with Image.open(path) as saved, Image.open(io.BytesIO(content)) as shown:
        assert (saved.size, shown.size) == ((512, 256), (256, 128))
        assert getattr(shown, "n_frames", 1) == frames
        if frames > 1:
            shown.seek(frames - 1)
            saved.seek(frames - 1)
            shown.load()
            assert shown.info["duration"] == 125
        expected = np.array(saved.convert("RGB").resize((256, 128)), dtype=float)
        assert np.abs(np.array(shown.convert("RGB"), dtype=float) - expected).mean() < 6
