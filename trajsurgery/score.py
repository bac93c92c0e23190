"""`python -m trajsurgery.score --reward hpsv2 IMAGES --prompts FILE`: scores of pictures, printed and saved."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trajsurgery.checkpoint import write_whole
from trajsurgery.errors import RewardError, SurgeryError
from trajsurgery.scorers import Reward, scorer
from trajsurgery.world import quiet

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Picture:
    """An image file and the text that it is to be scored with."""

    path: Path
    prompt: str


def pictures(images: Sequence[Path], prompts: Path) -> tuple[Picture, ...]:
    """The image files, those of a folder by name, with their prompts.

    Args:
        prompts: a .jsonl file of {"image": NAME, "prompt": TEXT}, in any order, or a text file with one prompt a line,
            in the order of the images.

    Raises:
        RewardError: no images; an image without a prompt, or more prompts than images.
    """
    paths = [path for given in images for path in (_within(given) if given.is_dir() else (given,))]
    gone = [path for path in paths if not path.is_file()]
    if gone or not paths:
        raise RewardError(f"there is no {gone[0]}." if gone else f"no images ({', '.join(KINDS)}) in {images[0]}.")
    if not prompts.is_file():
        raise RewardError(f"there is no file {prompts}: --prompts takes one prompt a line, or JSONL.")
    lines = [line for line in prompts.read_text().splitlines() if line.strip()]
    if prompts.suffix != ".jsonl":
        if len(lines) != len(paths):
            raise RewardError(
                f"{prompts} has {len(lines)} prompts for {len(paths)} images: one a line, in their order."
            )
        return tuple(Picture(path, line.strip()) for path, line in zip(paths, lines))
    try:
        texts = {str(row["image"]): str(row["prompt"]) for row in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise RewardError(f'{prompts}: a line is not {{"image": NAME, "prompt": TEXT}} ({error}).') from error
    missing = [path.name for path in paths if path.name not in texts]
    if missing:
        raise RewardError(f"{prompts} has no prompt for {missing[0]} and {len(missing) - 1} further images.")
    return tuple(Picture(path, texts[path.name]) for path in paths)


def _within(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in KINDS)


def read(path: Path, device: torch.device) -> Tensor:
    """A picture, Float[1 3 h w] in [0, 1].

    Raises:
        RewardError: it is none.
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as picture:
            found = pil_to_tensor(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise RewardError(f"{path} is no picture that PIL can read ({error}).") from error
    return found[None].to(device) / 255


@torch.no_grad()
def scores(reward: Reward, asked: Sequence[Picture], device: torch.device) -> list[float]:
    """The score of each picture, at its own size."""
    return [float(reward(read(picture.path, device), [picture.prompt])) for picture in asked]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for one value."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="trajsurgery score", description="Scores pictures with rewards.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="files, or folders of them")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE", help="one a line, or JSONL")
    parser.add_argument("--reward", required=True, action="append", metavar="NAME", help="may be given several times")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON; scores.json beside the prompts if left out")
    given, console = parser.parse_args(arguments), Console()
    try:
        return _run(given, console)
    except SurgeryError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1


def _run(given: Any, console: Console) -> int:
    asked = pictures(given.images, given.prompts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, about = dict[str, list[float]](), dict[str, dict[str, Any]]()
    for name in dict.fromkeys(given.reward):
        with quiet():
            reward = scorer(name, device)
        found[name] = scores(reward, asked, device)
        mean, error = summary(found[name])
        said = {key: getattr(reward, key, None) for key in ("scale", "source", "licence")}
        about[name] = {"mean": mean, "standard_error": None if math.isnan(error) else error, **said}
    rows = [
        {"image": str(picture.path), "prompt": picture.prompt, **{name: found[name][i] for name in found}}
        for i, picture in enumerate(asked)
    ]
    table = Table("image", *found)
    for i, picture in enumerate(asked):
        table.add_row(picture.path.name, *(f"{values[i]:.4f}" for values in found.values()))
    table.add_section()
    table.add_row("mean", *(f"{about[name]['mean']:.4f}" for name in found))
    table.add_row("standard error", *("" if (e := about[n]["standard_error"]) is None else f"{e:.4f}" for n in found))
    console.print(table, highlight=False)
    path = given.output or given.prompts.parent / "scores.json"
    text = json.dumps({"rewards": about, "images": rows}, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))
    console.print(f"In {path}.", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
