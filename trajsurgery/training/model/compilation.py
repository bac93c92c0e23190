"""torch.compile of layers that a run calls again and again: transformer blocks, decoder, a reward's image tower.

`nn.Module.compile` leaves the module in its place: names in a state dict, shards, adapters, moving averages and values
swapped in place are those of the eager one. A block has one graph without gradient and one or two with; the sampler's
times reach it as tensors, so another time needs no new graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trajsurgery.errors import RecipeError

BACKEND = "inductor"
"""Of torch.compile, by name."""


def compile_blocks(module: nn.Module) -> None:
    """Compile the repeated blocks of a transformer: the classes that diffusers names, else entries of module lists.

    Call it before FSDP wraps the blocks, so that its hooks run outside the graphs.

    Raises:
        RecipeError: the class has no such blocks.
    """
    names = set[str](getattr(module, "_repeated_blocks", None) or ())
    blocks = [part for part in module.modules() if type(part).__name__ in names] or _listed_layers(module, "")
    if not blocks:
        raise RecipeError(f"--rollout.compile: {type(module).__name__} has no repeated blocks. Leave it out.")
    _compile(blocks)


def run_eagerly(module: nn.Module) -> None:
    """Undo `compile_blocks`."""
    for part in module.modules():
        part._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage]
    torch.compiler.reset()


def compile_decoder(vae: Any) -> None:
    """Compile a VAE's decoder, before its calls are wrapped for checkpointing."""
    if not isinstance(getattr(vae, "decoder", None), nn.Module):
        raise RecipeError(f"--decoder.compile: {type(vae).__name__} has no decoder of its own. Leave it out.")
    vae.decoder.forward = torch.compile(vae.decoder.forward, backend=BACKEND)


def compile_image_tower(name: str, reward: Any) -> None:
    """Compile the layers of a reward's image tower: module lists inside a module whose name holds "vis".

    Raises:
        RecipeError: the reward is no module, or has no such layers.
    """
    layers = _listed_layers(reward, "vis") if isinstance(reward, nn.Module) else []
    if not layers:
        raise RecipeError(
            f"--compile-reward: {name} has no image tower that is found: an nn.ModuleList inside a module such as "
            "`vision_model` or `visual`. Leave it out, or compile your reward's layers yourself (layer.compile())."
        )
    _compile(layers)


def _listed_layers(module: nn.Module, word: str) -> list[nn.Module]:
    """Return the entries of module lists inside modules whose names hold a word, but for lists inside those entries."""
    lists = [part for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and word in name]
    layers = [layer for part in lists for layer in part]
    inner = {part for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if layer not in inner]


def _compile(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        layer.compile(backend=BACKEND)
