"""Two ranks: the gradient under FSDP2 and DDP is the mean of the ranks' gradients, or the way of running is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.builders.processes import spawn_ranks
from trajsurgery import SamplerError, Trajectory, apply, backward, leapalign, operate, rollout, sample, tiny

RANKS = 2
PLAN = leapalign(6, 3, 0.3)
SIGMAS = torch.linspace(1, 0, 9, dtype=torch.float64)
WORDS = ["a red circle", "a blue square"]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) * (1 + sigma)
        return x


def noise_of(rank: int) -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def recorded(rank: int) -> Trajectory:
    return rollout(Blocks(), noise_of(rank), SIGMAS)


def in_one_pass(memory: Any) -> Any:
    return lambda field, rank: sample(PLAN, field, noise_of(rank), SIGMAS, memory=memory)[0].sum().backward()


def on_a_trajectory(memory: Any) -> Any:
    return lambda field, rank: apply(PLAN, recorded(rank), field, memory).sum().backward()


WAYS = {
    "retain": in_one_pass("retain"),
    "split": in_one_pass("split"),
    "split on a trajectory": on_a_trajectory("split"),
    "staged": lambda field, rank: backward(PLAN, recorded(rank), field, torch.ones(3, 4, dtype=torch.float64)),
}


def sharded(module: nn.Module, blocks: Any) -> Any:
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh)
    return module


def gradients(module: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]  # type: ignore[operator]


def mean_of_ranks(way: Any) -> list[Tensor]:
    """The gradient that every rank should hold, from one process."""
    field = Blocks()
    for rank in range(RANKS):
        way(field, rank)
    return [g / RANKS for g in gradients(field)]


def check_field(way: Any, rank: int) -> None:
    expected = mean_of_ranks(WAYS["retain"])
    field = Blocks()
    way(sharded(field, field.blocks), rank)
    assert_close(gradients(field), expected, rtol=1e-12, atol=1e-12)
    field = Blocks()
    replicated = DistributedDataParallel(field)
    if way in (WAYS["split"], WAYS["split on a trajectory"]):
        with pytest.raises(SamplerError, match="DistributedDataParallel averages"):
            way(replicated, rank)
        return
    way(replicated, rank)
    assert_close(gradients(field), expected, rtol=1e-12, atol=1e-12)


def train_pipeline(pipe: Any, rank: int, memory: Any) -> None:
    generator = torch.Generator().manual_seed(rank)
    with operate(pipe, leapalign(4, 2), memory) as surgery:
        pipe([WORDS[rank]], num_inference_steps=5, height=32, width=32, output_type="latent", generator=generator)
    surgery.outputs[0].double().square().sum().backward()


def check_pipeline(memory: Any, rank: int) -> None:
    alone = tiny.pipeline()
    for each in range(RANKS):
        train_pipeline(alone, each, "retain")
    expected = [g / RANKS for g in gradients(alone.transformer)]
    pipe = tiny.pipeline()
    sharded(pipe.transformer, [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks])
    train_pipeline(pipe, rank, memory)
    actual = gradients(pipe.transformer)
    assert len(actual) == len(expected)
    norm = torch.stack([g.norm() for g in expected]).norm()
    assert torch.stack([(a - b).norm() for a, b in zip(actual, expected, strict=True)]).norm() <= 1e-5 * norm
    alone.transformer = DistributedDataParallel(alone.transformer)
    if memory == "split":
        with pytest.raises(SamplerError, match="DistributedDataParallel averages"), operate(alone, PLAN, memory):
            pass


CHECKS = {f"field, {name}": (check_field, way) for name, way in WAYS.items()} | {
    f"pipeline, {memory}": (check_pipeline, memory) for memory in ("retain", "split")
}


def run_rank(rank: int, folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    check, way = CHECKS[name]
    check(way, rank)
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends otherwise, after all was checked


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_train_on_the_mean_gradient(name: str, tmp_path: Path) -> None:
    spawn_ranks(run_rank, (tmp_path, name), RANKS)
