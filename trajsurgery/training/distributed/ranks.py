"""The processes of a run that `torchrun` or `accelerate launch` started: their device, their rows, sums over them.

Without such a launcher there is one rank, and nothing here communicates.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trajsurgery.errors import RecipeError


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_this_node() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def is_main() -> bool:
    """Whether this process writes the files and speaks."""
    return rank() == 0


def choose_device(name: str) -> torch.device:
    """Return the device that `--device` names; "auto" is this rank's GPU if there is one.

    Raises:
        RecipeError: there is no such device here.
    """
    place = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        return torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: it is auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda":
        device = torch.device("cuda", device.index if ":" in name else place)
        if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
            have = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise RecipeError(f"--device {name}: torch {torch.__version__} sees {have} CUDA devices here.")
    elif device.type != "cpu":
        raise RecipeError(f"--device {name}: it is auto, cpu, cuda or cuda:N.")
    return device


def join(device: torch.device) -> None:
    """Join the processes that a launcher started, if one did; make `device` the current one.

    Gloo carries what lies on the CPU, NCCL what lies on a GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """End the communication with the other processes, if there was any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rows(batch: int) -> range:
    """Return the rows of the global batch that this rank samples.

    Raises:
        RecipeError: the batch can't be divided among the ranks.
    """
    if batch % count():
        raise RecipeError(f"--rollout.batch {batch} can't be divided among {count()} processes: take a multiple.")
    share = batch // count()
    return range(rank() * share, (rank() + 1) * share)


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def anywhere(flags: Tensor) -> Tensor:
    """Return, for each flag of a boolean tensor, whether it is set on any rank."""
    return total(flags.int()) > 0 if count() > 1 else flags


def any_rank(flag: bool) -> bool:
    """Return whether a flag is set on any rank."""
    return bool(anywhere(torch.tensor([flag], device="cpu"))) if count() > 1 else flag


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order. Tensors in it lie on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return when all ranks have come here."""
    any_rank(False)
