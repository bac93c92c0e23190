"""`trajsurgery score`: scores of pictures, printed and saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from trajsurgery.errors import RewardError
from trajsurgery.evaluation.options import Score
from trajsurgery.rewards import contract
from trajsurgery.rewards.by_name import Reward, scorer
from trajsurgery.training.checkpoint import write_whole
from trajsurgery.training.components import quiet
from trajsurgery.training.preflight import lacking_reward

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
def scores(
    reward: Reward,
    asked: Sequence[Picture],
    device: torch.device,
    batch: int = 1,
    done: Callable[[int], object] = lambda _: None,
) -> list[float]:
    """The score of each picture, at its own size: the original's number, whose pixels are bytes too (`rounded`).

    Args:
        batch: so many at once, of those that follow each other and have one size.
        done: told how many were graded.
    """
    _on_bytes(reward)
    found = list[float]()
    for images, texts in _batches(asked, device, batch):
        found += reward(images, texts).float().tolist()
        done(len(texts))
    return found


def _on_bytes(reward: Reward) -> None:
    """Sets `rounded` of a reward and of those that it is made of."""
    for part in reward.modules() if isinstance(reward, nn.Module) else ():
        if isinstance(part, contract.Reward):
            part.rounded = True


def _batches(asked: Sequence[Picture], device: torch.device, batch: int) -> Iterator[tuple[Tensor, list[str]]]:
    images, texts = list[Tensor](), list[str]()
    for picture in asked:
        image = read(picture.path, device)
        if images and (len(images) == batch or image.shape != images[0].shape):
            yield torch.cat(images), texts
            images, texts = [], []
        images.append(image)
        texts.append(picture.prompt)
    if images:
        yield torch.cat(images), texts


def about(reward: Reward) -> dict[str, Any]:
    """What a reward says of itself."""
    return {key: getattr(reward, key, None) for key in ("scale", "source", "licence")}


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for one value."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def run(given: Score, console: Console) -> int:
    """The command; returns the exit code.

    Raises:
        RewardError, RecipeError: what does not fit; nothing is written then.
    """
    if not given.reward:
        raise RewardError("no reward to score with: name some with --reward NAME.")
    if given.batch < 1:
        raise RewardError(f"--batch {given.batch}: at least one picture at once.")
    if lacking := [said for name in given.reward if (said := lacking_reward(name))]:
        raise RewardError("\n".join(lacking))
    asked = pictures(given.images, given.prompts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, told = dict[str, list[float]](), dict[str, dict[str, Any]]()
    for name in dict.fromkeys(given.reward):
        with quiet():
            reward = scorer(name, device)
        found[name] = scores(reward, asked, device, given.batch)
        mean, error = summary(found[name])
        told[name] = {"mean": mean, "standard_error": None if math.isnan(error) else error, **about(reward)}
    rows = [
        {"image": str(picture.path), "prompt": picture.prompt, **{name: found[name][i] for name in found}}
        for i, picture in enumerate(asked)
    ]
    console.print(_table(asked, found, told), highlight=False)
    path = given.output or given.prompts.parent / "scores.json"
    text = json.dumps({"rewards": told, "images": rows}, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))
    console.print(f"In {path}.", highlight=False, soft_wrap=True)
    return 0


def _table(asked: Sequence[Picture], found: dict[str, list[float]], told: dict[str, dict[str, Any]]) -> Table:
    table = Table("image", *found)
    for i, picture in enumerate(asked):
        table.add_row(picture.path.name, *(f"{values[i]:.4f}" for values in found.values()))
    table.add_section()
    table.add_row("mean", *(f"{told[name]['mean']:.4f}" for name in found))
    table.add_row("standard error", *("" if (e := told[n]["standard_error"]) is None else f"{e:.4f}" for n in found))
    return table
