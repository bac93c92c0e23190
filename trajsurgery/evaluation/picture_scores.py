"""`trajsurgery score`: score picture files, print and save the scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from trajsurgery.errors import RewardError
from trajsurgery.evaluation.options import Score
from trajsurgery.evaluation.paired_statistics import mean_gain
from trajsurgery.evaluation.picture_files import picture_remarks, read_picture
from trajsurgery.rewards import contract
from trajsurgery.rewards.loading import Reward, load_reward, quiet_rewards, reward_problem
from trajsurgery.rewards.packaged import is_packaged
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.distributed.ranks import choose_device
from trajsurgery.training.prompts import read_prompts

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Picture:
    """An image file and the prompt to score it with."""

    path: Path
    prompt: str


def find_pictures(images: Sequence[Path], prompts: Path) -> tuple[Picture, ...]:
    """Return the image files (those of a folder by name) with their prompts.

    Args:
        prompts: a file for `read_prompts`: rows of {"image": NAME, "prompt": TEXT} in any order, or prompts in the
            order of the images.

    Raises:
        RewardError: no images, an image without a prompt, or another number of prompts than images.
        RecipeError: the prompts can't be read.
    """
    folders = {entry: sorted(entry.iterdir()) for entry in images if entry.is_dir()}
    pictures = {folder: [path for path in files if path.suffix.lower() in KINDS] for folder, files in folders.items()}
    paths = [path for entry in images for path in pictures.get(entry, [entry])]
    absent = [path for path in paths if not path.is_file()]
    if absent or not paths:
        raise RewardError(f"there is no {absent[0]}." if absent else f"no images ({', '.join(KINDS)}) in {images[0]}.")
    if not prompts.is_file():
        raise RewardError(f"there is no file {prompts}: --prompts takes one prompt a line, CSV or JSONL.")
    entries = read_prompts(prompts)
    texts = {str(entry.record["image"]): entry.text for entry in entries if entry.record and "image" in entry.record}
    if not texts and len(entries) != len(paths):
        raise RewardError(f"{prompts} has {len(entries)} prompts for {len(paths)} images: one a line, in their order.")
    if not texts:
        return tuple(Picture(path, entry.text) for path, entry in zip(paths, entries))
    missing = [path.name for path in paths if path.name not in texts]
    if missing:
        raise RewardError(f"{prompts} has no prompt for {missing[0]} and {len(missing) - 1} further images.")
    return tuple(Picture(path, texts[path.name]) for path in paths)


@torch.no_grad()
def score_pictures(
    reward: Reward,
    pictures: Sequence[Picture],
    device: torch.device,
    batch: int = 1,
    done: Callable[[int], object] = lambda _: None,
) -> list[float]:
    """Return the score of each picture at its own size, rounding pixels to bytes as the original code does (`rounded`).

    Args:
        batch: so many at once, of those that follow each other and have one size.
        done: called with the number of pictures scored.
    """
    if isinstance(reward, nn.Module):
        reward.to(device)
    for part in reward.modules() if isinstance(reward, nn.Module) else ():
        if isinstance(part, contract.Reward):
            part.rounded = True
    scores = list[float]()
    for images, texts in _batches(pictures, device, batch):
        scores += reward(images, texts).float().tolist()
        done(len(texts))
    return scores


def _batches(pictures: Sequence[Picture], device: torch.device, batch: int) -> Iterator[tuple[Tensor, list[str]]]:
    images, texts = list[Tensor](), list[str]()
    for picture in pictures:
        image = read_picture(picture.path, device)
        if images and (len(images) == batch or image.shape != images[0].shape):
            yield torch.cat(images), texts
            images, texts = [], []
        images.append(image)
        texts.append(picture.prompt)
    if images:
        yield torch.cat(images), texts


def check_rewards(names: Sequence[str]) -> None:
    """Raise if a reward can't be loaded.

    Raises:
        RewardError: no names; all that is missing.
    """
    problems = [problem for name in names if (problem := reward_problem(name))]
    if problems or not names:
        raise RewardError("\n".join(problems) or "no reward to score with: name some with --reward NAME.")


def reward_facts(reward: Reward) -> dict[str, Any]:
    """Return scale, source and licence of a reward."""
    return {key: getattr(reward, key, None) for key in ("scale", "source", "licence")}


def score_command(options: Score, console: Console) -> int:
    """Run the command; return the exit code.

    Raises:
        RewardError, RecipeError: invalid options, before anything is written.
    """
    if options.batch < 1:
        raise RewardError(f"--batch {options.batch}: at least one picture at once.")
    check_rewards(options.reward)
    pictures = find_pictures(options.images, options.prompts)
    for remark in picture_remarks([picture.path for picture in pictures]):
        console.print(remark, style="yellow", markup=False, highlight=False, soft_wrap=True)
    device = choose_device(options.device)
    scores, facts = dict[str, list[float]](), dict[str, dict[str, Any]]()
    for name in dict.fromkeys(options.reward):
        with quiet_rewards() if is_packaged(name) else nullcontext():  # transformers takes a second to import
            reward = load_reward(name, device)
        scores[name] = score_pictures(reward, pictures, device, options.batch)
        mean = mean_gain(torch.tensor(scores[name]), tuple(str(picture.path) for picture in pictures))
        error = None if math.isnan(mean.se) else mean.se
        facts[name] = {"mean": mean.after, "standard_error": error, **reward_facts(reward)}
    rows = [
        {"image": str(picture.path), "prompt": picture.prompt, **{name: scores[name][i] for name in scores}}
        for i, picture in enumerate(pictures)
    ]
    console.print(_scores_table(pictures, scores, facts), highlight=False)
    path = options.output or options.prompts.parent / "scores.json"
    text = json.dumps({"rewards": facts, "images": rows}, indent=1) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))
    console.print(f"In {path}.", highlight=False, soft_wrap=True)
    return 0


def _scores_table(
    pictures: Sequence[Picture], scores: dict[str, list[float]], facts: dict[str, dict[str, Any]]
) -> Table:
    table = Table("image", *scores)
    for i, picture in enumerate(pictures):
        table.add_row(picture.path.name, *(f"{values[i]:.4f}" for values in scores.values()))
    table.add_section()
    table.add_row("mean", *(f"{facts[name]['mean']:.4f}" for name in scores))
    table.add_row("standard error", *("" if (e := facts[n]["standard_error"]) is None else f"{e:.4f}" for n in scores))
    return table
