"""Film strip of a noise search: images with their rewards, and the reward's curve, from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

LINE, BEST = "#0b6e99", "#2e7d32"


def choose_frames(count: int, pictures: int) -> list[int]:
    """Return which of `count` frames to show: the first, the last, and others, dense at the start."""
    spaced = set((np.geomspace(1, count, pictures).round().astype(int) - 1).tolist())
    others = [i for i in range(count) if i not in spaced]
    return sorted([*spaced, *others[: pictures - len(spaced)]])


def draw_filmstrip(
    path: Path, title: str, frames: Sequence[Mapping[str, Any]], images: Sequence[Tensor], pictures: int = 8
) -> Path:
    """Draw some of the images side by side with their rewards, and below them the reward of every iteration.

    Args:
        frames: {"iteration", "reward"} of each, in order.
        images: [3 h w] bytes, one a frame.
        pictures: how many to show, plus the best one.
    """
    from matplotlib.figure import Figure

    rewards = [frame["reward"] for frame in frames]
    best = max(range(len(rewards)), key=rewards.__getitem__)
    places = sorted({*choose_frames(len(frames), pictures), best})
    figure = Figure(figsize=(max(6.0, 1.7 * len(places)), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.25, 1)).flat
    for axes, place in zip(upper.subplots(1, len(places), squeeze=False)[0], places):
        side = images[place].shape[-1]
        axes.imshow(images[place].permute(1, 2, 0).numpy(), interpolation="nearest" if side < 128 else "antialiased")
        axes.set(xticks=[], yticks=[])
        colour = BEST if place == best else "black"
        name = "best: " if place == best else ""
        label = f"{name}iteration {frames[place]['iteration']}\nreward {rewards[place]:.3f}"
        axes.set_xlabel(label, fontsize=10, color=colour)
        axes.spines[:].set_color(colour)
        axes.spines[:].set_linewidth(2.5 if place == best else 0.5)
    _curve(lower.subplots(), frames, best, places)
    figure.savefig(path, dpi=130)
    return path


def _curve(axes: Any, frames: Sequence[Mapping[str, Any]], best: int, places: Sequence[int]) -> None:
    times, rewards = [frame["iteration"] for frame in frames], [frame["reward"] for frame in frames]
    axes.plot(times, rewards, color=LINE, linewidth=2, zorder=1)
    axes.scatter([times[i] for i in places], [rewards[i] for i in places], s=25, color=LINE, zorder=2)
    axes.scatter(times[best], rewards[best], s=60, color=BEST, zorder=3)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="iteration; the dots are the images above", ylabel="reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
