"""The images on the way of an ascent, with their rewards below, and the reward's curve. Reads records only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

LINE, BEST = "#0b6e99", "#2e7d32"


def chosen(count: int, pictures: int) -> list[int]:
    """Which of `count` frames are shown: the first, the last, and others, dense at the start, where most happens."""
    last = count - 1
    if pictures >= count:
        return list(range(count))
    ratio = (last + 1) ** (1 / max(1, pictures - 1))
    found = [0]
    for i in range(1, pictures):  # at least one further on than the one before, with room for those that follow
        found.append(min(max(found[-1] + 1, round(ratio**i) - 1), last - (pictures - 1 - i)))
    return found


def filmstrip(
    path: Path, title: str, frames: Sequence[Mapping[str, Any]], images: Sequence[Tensor], pictures: int = 8
) -> Path:
    """Draws some of the images side by side, their rewards below, and under them the reward of every iteration.

    Args:
        frames: {"iteration", "reward"} of each, in order.
        images: [3 h w] bytes, one a frame.
        pictures: how many to show, the best one beside them if it is none of them.
    """
    from matplotlib.figure import Figure

    rewards = [frame["reward"] for frame in frames]
    best = max(range(len(rewards)), key=rewards.__getitem__)
    places = sorted({*chosen(len(frames), pictures), best})
    figure = Figure(figsize=(max(6.0, 1.7 * len(places)), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.25, 1)).flat
    for axes, place in zip(upper.subplots(1, len(places), squeeze=False)[0], places):
        side = images[place].shape[-1]
        axes.imshow(images[place].permute(1, 2, 0).numpy(), interpolation="nearest" if side < 128 else "antialiased")
        axes.set(xticks=[], yticks=[])
        colour = BEST if place == best else "black"
        name = "best: " if place == best else ""
        said = f"{name}iteration {frames[place]['iteration']}\nreward {rewards[place]:.3f}"
        axes.set_xlabel(said, fontsize=10, color=colour)
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
