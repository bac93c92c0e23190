"""A training run whose second rank raises, or dies, in the third iteration; its arguments: the folder, and how."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.builders import toy_world
from trajsurgery.cli import train_command
from trajsurgery.training.distributed import ranks
from trajsurgery.training.recipe import Recipe


def recipe(folder: Path) -> Recipe:
    return toy_world.recipe(folder, iterations=6, save_every=1, shard="fsdp")


class FailsOnce(toy_world.LikesRed):
    """The toy reward, until the second rank scores the images of its third iteration."""

    calls = 0

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += images.requires_grad
        if ranks.rank() == 1 and self.calls == 4:  # the first call with gradient is the check of the reward
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the reward's model is gone")
        return super().__call__(images, prompts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.join(torch.device("cpu"))
    settings = recipe(Path(sys.argv[1]))
    train_command.main(settings, replace(toy_world.world(settings), reward=FailsOnce(sys.argv[2])))
