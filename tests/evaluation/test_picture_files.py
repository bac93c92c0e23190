"""Picture files are read as viewers show them: 16 bits, transparency, orientation, animation; plain RGB bit for bit."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from trajsurgery.cli import main
from trajsurgery.errors import RewardError
from trajsurgery.evaluation.picture_files import picture_remarks, read_picture

CPU = torch.device("cpu")
NOISE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
REWARD = "tests.builders.toy_world:LikesRed"


def read(path: Path) -> torch.Tensor:
    """Float[h w 3]."""
    return read_picture(path, CPU)[0].permute(1, 2, 0)


@pytest.mark.parametrize("name", ["p.png", "p.bmp", "p.jpg", "p.webp", "p.tif"])
def test_plain_rgb_is_what_torchvision_reads(tmp_path: Path, name: str) -> None:
    Image.fromarray(NOISE).save(tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert torch.equal(read_picture(tmp_path / name, CPU), pil_to_tensor(picture)[None] / 255)
    assert picture_remarks([tmp_path / name]) == []


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_other_modes_without_transparency_are_converted_by_pil(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(NOISE).convert(mode)
    picture.save(tmp_path / "p.tif")
    np.testing.assert_array_equal(read(tmp_path / "p.tif").numpy() * 255, np.asarray(picture.convert("RGB")))
    assert picture_remarks([tmp_path / "p.tif"]) == []


@pytest.mark.parametrize("dtype, name", [(np.uint16, "p.png"), (np.uint16, "p.tif"), (np.int32, "p.tif")])
def test_16_bits_are_scaled(tmp_path: Path, dtype: type[np.generic], name: str) -> None:
    """PIL's own conversion clips every value above 255 to white."""
    values = np.array([[0, 255, 256], [32768, 65534, 65535]], dtype)
    Image.fromarray(values).save(tmp_path / name)
    expected = torch.from_numpy(values.astype(np.float32) / 65535)[..., None].expand(-1, -1, 3)
    torch.testing.assert_close(read(tmp_path / name), expected)


def test_16_bits_of_colours_are_scaled(tmp_path: Path) -> None:
    values = np.array([[[65535, 32768, 0], [257, 514, 65278]]], dtype=">u2")
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(b"\0" + values.tobytes())}
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in {**chunks, b"IEND": b""}.items():
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    (tmp_path / "p.png").write_bytes(data)
    assert (read(tmp_path / "p.png") - torch.from_numpy(values.astype(np.float32) / 65535)).abs().max() < 1 / 255


@pytest.mark.parametrize(
    "values", [np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32), np.ones((2, 2), np.float32)]
)
def test_values_of_no_known_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "p.tif")
    with pytest.raises(RewardError, match=r"p\.tif (has values from|holds floats).* 8 or 16 bits"):
        read(tmp_path / "p.tif")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "key"])
def test_what_is_transparent_is_white(tmp_path: Path, kind: str) -> None:
    """The left pixel is opaque black, the right one hides black; RGBA and LA have one that is half transparent too."""
    path = tmp_path / "p.png"
    if kind in ("RGBA", "LA"):
        picture = Image.new(kind, (3, 1), (0,) * (len(kind) - 1) + (255,))
        picture.putpixel((1, 0), (0,) * (len(kind) - 1) + (0,))
        picture.putpixel((2, 0), (0,) * (len(kind) - 1) + (51,))
        picture.save(path)
    else:
        picture = Image.new("P" if kind == "palette" else "RGB", (2, 1))
        if kind == "palette":
            picture.putpalette([0, 0, 0, 0, 0, 1])
            picture.putpixel((1, 0), 1)
            picture.save(path, transparency=1)
        else:
            picture.putpixel((1, 0), (0, 0, 1))
            picture.save(path, transparency=(0, 0, 1))
    pixels = read(path)
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[0, 1].tolist() == [1, 1, 1]
    if kind in ("RGBA", "LA"):
        torch.testing.assert_close(pixels[0, 2], torch.full((3,), 0.8))
    assert picture_remarks([path]) == ["p.png: transparent, and scored on white."]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    """The EXIF standard's eight orientations: how the stored rows are turned to be shown."""
    shown = np.zeros((2, 3, 3), np.uint8)
    shown[0, 0], shown[0, 2], shown[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown),
        7: shown[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "p.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "p.png").numpy() * 255, shown)


@pytest.mark.parametrize("name", ["p.gif", "p.webp", "p.png"])
def test_of_an_animated_picture_the_first_frame_is_scored_and_said(tmp_path: Path, name: str) -> None:
    red, green = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 255, 0))
    red.save(tmp_path / name, save_all=True, append_images=[green], lossless=True)
    assert read(tmp_path / name)[0, 0].tolist() == [1, 0, 0]
    red.save(tmp_path / "still.gif")
    assert picture_remarks([tmp_path / name, tmp_path / "still.gif"]) == [
        f"{name}: animated, and scored by the first frame."
    ]


def test_a_photo_with_a_preview_is_not_animated(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    picture.save(tmp_path / "p.mpo", save_all=True, append_images=[picture])
    assert picture_remarks([tmp_path / "p.mpo"]) == []


@pytest.mark.parametrize("data", [b"", b"no picture", "cut"])
def test_what_is_no_picture_is_told_before_a_reward_is_loaded(
    tmp_path: Path, data: bytes | str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(NOISE).save(tmp_path / "p.png")
    whole = (tmp_path / "p.png").read_bytes()
    (tmp_path / "p.png").write_bytes(whole[:40] if isinstance(data, str) else data)
    (tmp_path / "p.txt").write_text("noise\n")
    words = ["score", str(tmp_path / "p.png"), "--prompts", str(tmp_path / "p.txt"), "--reward", REWARD]
    assert main(words) == 1
    assert "p.png is no picture that PIL can read" in capsys.readouterr().out


def test_the_command_says_what_it_composites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "p.csv").write_text("image,prompt\nb.png,red\na.png,red\n")
    assert main(["score", str(tmp_path), "--prompts", str(tmp_path / "p.csv"), "--reward", REWARD]) == 0
    assert "a.png and 1 further pictures: transparent, and scored on white." in capsys.readouterr().out
