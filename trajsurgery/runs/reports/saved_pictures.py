"""Pictures of a run as files, which report.html shows: held-out pairs, and contact sheets of fixed prompts.

    samples/before/000.png  samples/after/000.png  samples/samples.json
    sheets/000050/00.png    sheets/000050/sheet.png    sheets/000050/sheet.json

A video is an animated WebP file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trajsurgery.evaluation.held_out import HeldOutScores
from trajsurgery.runs.reports.run_report import choose_pictures
from trajsurgery.training.checkpoints.checkpoint import SHEETS
from trajsurgery.training.checkpoints.output_files import storage_errors, write_atomically
from trajsurgery.training.checkpoints.run_log import finite_or_none

SAMPLES = "samples"
SIDE = 512
"""Larger pictures are saved with this longer side, in pixels."""

FRAME_MILLISECONDS = 125


def save_samples(output: Path, before: HeldOutScores, after: HeldOutScores, count: int = 24) -> None:
    """Write pictures of the same held-out prompts before and after, and samples.json with prompts and scores.

    Args:
        count: how many pairs; `choose_pictures` says which.
    """
    folder, entries = output / SAMPLES, list[dict[str, Any]]()
    for number, place in enumerate(choose_pictures(before, after, count)[0]):
        entry: dict[str, Any] = {"prompt": before.texts[place], "category": before.categories[place]}
        for when, scores in (("before", before), ("after", after)):
            file = save_picture(scores.pictures[place], folder / when / f"{number:03d}")
            correct = None if scores.correct is None else bool(scores.correct[place])
            entry[when] = {"file": f"{when}/{file.name}", "reward": float(scores.reward[place]), "correct": correct}
        entries.append(entry)
    _write_json(folder / "samples.json", entries)


def save_sheet(output: Path, iteration: int, scores: HeldOutScores, terms: Mapping[str, float] | None) -> None:
    """Write the pictures of a contact sheet, all of them in sheet.png, then sheet.json with prompts and rewards.

    Args:
        terms: gradient norms by kind of term, if they were measured.
    """
    folder = output / SHEETS / f"{iteration:06d}"
    from torchvision.utils import make_grid

    files = [save_picture(image, folder / f"{number:02d}").name for number, image in enumerate(scores.pictures)]
    still = scores.pictures if scores.pictures.dim() == 4 else scores.pictures[:, 0]  # of a video the first frame
    save_picture(make_grid(still, nrow=4, pad_value=255), folder / "sheet", side=4 * SIDE)
    sheet = {"iteration": iteration, "prompts": scores.texts, "rewards": scores.reward.tolist(), "files": files}
    _write_json(folder / "sheet.json", {**sheet, "terms": terms})


def save_picture(picture: Tensor, path: Path, side: int = SIDE) -> Path:
    """Write an image [3 h w] as PNG, or a video [frames 3 h w] as animated WebP; return the path with its ending.

    Args:
        side: of a larger picture the longer side is scaled down to this, in pixels.

    Raises:
        OutputError: the file system refuses.
    """
    from PIL import Image

    frames = picture if picture.dim() == 4 else picture[None]
    images = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames]
    for image in images:
        image.thumbnail((side, side))
    path = path.with_suffix(".webp" if picture.dim() == 4 else ".png")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(images) == 1:
            images[0].save(path)
        else:
            options: dict[str, Any] = {"duration": FRAME_MILLISECONDS, "loop": 0, "lossless": True}
            images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(finite_or_none(value), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
