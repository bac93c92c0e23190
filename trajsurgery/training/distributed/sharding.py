"""What trains on several ranks: FSDP2 (`fully_shard`, a block at a time) or a whole copy on each rank.

Gradients are sums over ranks: each rank weighs its images by the global batch. Moving averages, checkpoints and the
anchor work on a rank's own shards, `local(parameter)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trajsurgery.errors import RecipeError
from trajsurgery.training.distributed import ranks
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Gather, Shard

SMALL = 10**9
"""Parameters up to which "auto" keeps a whole copy on each rank."""


def choose(shard: Shard, trained: int, count: int) -> Shard:
    """Return what "auto" stands for: nothing for one rank, copies for small models and adapters, else FSDP.

    Args:
        trained: how many parameters train.
        count: how many ranks there are.

    Raises:
        RecipeError: several ranks would each train a model of their own.
    """
    if count == 1:
        return "none"
    if shard == "none":
        raise RecipeError(
            f"--shard none, and {count} processes were started: each would train a model of its own. Take "
            "auto, fsdp or ddp, or start one process."
        )
    if shard == "auto":
        return "ddp" if trained <= SMALL else "fsdp"
    return shard


def distribute(module: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Shard or copy a module over the ranks, after what trains is set. It ends on `device`.

    Adapters beside a frozen base stay whole on each rank: FSDP wants one dtype a group, and they are small. Blocks are
    gathered in the recipe's precision; gradients are reduced in float32.
    """
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    way, by_layer = choose(recipe.shard, trained, ranks.count()), recipe.gather == "layer"
    if way != "fsdp":
        module.to(device)
        _copy_from_main(module.parameters() if way == "ddp" else ())
        return
    adapters = [p for p in module.parameters() if p.requires_grad] if recipe.train.what == "lora" else []
    for parameter in adapters:
        parameter.data = parameter.data.to(device)
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {
        "mesh": _mesh(device),
        "mp_policy": low if recipe.rollout.precision == "bfloat16" else MixedPrecisionPolicy(cast_forward_inputs=False),
        "reshard_after_forward": by_layer,
        "ignored_params": set(adapters),
    }
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    for block in _blocks(module):
        fully_shard(block, **options)
    fully_shard(module, **options)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    _copy_from_main(adapters)
    for part in _sharded_parts(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_reshard_after_backward(by_layer, recurse=False)
        part.set_requires_gradient_sync(by_layer, recurse=False)


def _mesh(device: torch.device) -> DeviceMesh:
    """Shards within a node, copies across nodes (HSDP)."""
    within = ranks.on_this_node()
    nodes = ranks.count() // within
    if nodes > 1:
        return init_device_mesh(device.type, (nodes, within), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (ranks.count(),), mesh_dim_names=("shard",))


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: of the classes that diffusers names, else the entries of its module lists."""
    names: set[str] = set(getattr(module, "_no_split_modules", None) or getattr(module, "_repeated_blocks", None) or [])
    blocks = [part for part in module.modules() if type(part).__name__ in names]
    return blocks or [block for part in module.children() if isinstance(part, nn.ModuleList) for block in part]


@torch.no_grad()
def _copy_from_main(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        dist.broadcast(parameter, 0)


def _sharded_parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP holds the module's weights."""
    return isinstance(module, FSDPModule)


def release(module: nn.Module) -> None:
    """Drop the gathered weights. Call it before sharded weights are changed: the next call gathers them anew."""
    for part in _sharded_parts(module):
        part.reshard()


def reduce_in(module: nn.Module, last: bool) -> None:
    """Say whether the next backward passes are those of the iteration's last rollout: with --gather layer, copies
    across nodes are summed in them alone.
    """
    for part in _sharded_parts(module):
        part.set_requires_all_reduce(last, recurse=False)


def reduce_gradients(module: nn.Module, gather: Gather) -> None:
    """Sum the gradients of sharded weights over the ranks, once, after an iteration's last backward pass.

    With `gather` "iteration" FSDP has added them up whole on each rank. Which call's backward pass is the last is known
    only afterwards, so FSDP's end of a backward pass runs once more, with reduction on, as torch's own pipelines run it
    (torch/distributed/pipelining/stage.py, `perform_reduce_grad`). With "layer" each call's has reduced them.
    """
    if gather == "iteration" and isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(True)
        cast(Any, fully_shard).state(module)._root_post_backward_final_callback()
        module.set_requires_gradient_sync(False)


def reduce_copies(parameters: Sequence[Tensor]) -> None:
    """Sum the gradients of parameters that every rank holds whole; FSDP reduces the others."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if ranks.count() > 1 and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, value in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(value.view_as(gradient))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor. All ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collect(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor on the first rank's CPU, and nothing of it elsewhere; others as they are.

    All ranks call this together.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    value = tensor.full_tensor()
    return value.cpu() if ranks.is_main() else value.new_empty(0, device="cpu")


def sharded_like(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's shard as part of a sharded tensor, if the parameter is one. They share their memory."""
    if not isinstance(parameter, DTensor):
        return shard
    mesh = _mesh_on(shard.device.type, parameter.device_mesh)
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(shard, mesh, parameter.placements, shape=shape, stride=stride, run_check=False)


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor; the tensor itself if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@cache
def _mesh_on(device_type: str, mesh: DeviceMesh) -> DeviceMesh:
    if mesh.device_type == device_type:
        return mesh
    return init_device_mesh(device_type, tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)


def unsharded_copy(module: Any) -> Any:
    """Return a diffusers module on the first rank's CPU with the weights of a sharded one, None elsewhere.

    All ranks call this together.
    """
    state = {name: collect(value) for name, value in module.state_dict().items()}
    if not ranks.is_main():
        return None
    with torch.device("meta"):
        original: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
        copy = original.from_config(module.config)
    copy.load_state_dict(state, assign=True)
    return copy
