"""Decoding with gradient through a frozen VAE: tiles, recomputation, dtype, offloading."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trajsurgery.errors import RecipeError
from trajsurgery.training.faults.memory_errors import memory_of
from trajsurgery.training.model.compilation import compile_decoder
from trajsurgery.training.settings import Decoder

OVERLAP = 0.25
"""Share of a tile's side that overlaps the next one (diffusers' value)."""


def prepare_vae(vae: Any, settings: Decoder, autocast: bool = False) -> None:
    """Configure a VAE as the settings say, for every later call of `decode`.

    Args:
        vae: frozen, on the device where it decodes.
        autocast: whether the transformer runs in bfloat16 (for precision "auto").

    Raises:
        RecipeError: its class supports no tiles, slices or gradient checkpointing.
    """
    weights_dtype = vae_dtype(vae, settings, autocast)
    if any(p.dtype != weights_dtype for p in vae.parameters()):  # the dry run's parameters can't be moved
        nn.Module.to(vae, weights_dtype)
    if settings.tiling is not None:
        _enable_tiling(vae, settings.tiling)
    if settings.slicing:
        if not hasattr(vae, "use_slicing"):
            raise RecipeError(f"--decoder.slicing: {type(vae).__name__} decodes no slices. Leave it out.")
        vae.enable_slicing()
    if settings.compile:
        compile_decoder(vae)
    if settings.checkpointing:
        _checkpoint_decoder(vae)
    _decode_in_own_dtype(vae)
    device = next(vae.parameters()).device
    if not settings.stay and device.type != "cpu":
        OffloadedModule(vae, device)


def vae_dtype(vae: Any, settings: Decoder, autocast: bool) -> torch.dtype:
    """Return the dtype for the VAE's weights. Without `force_upcast = false` in its config, bfloat16 may overflow."""
    bfloat16_is_safe = not getattr(vae.config, "force_upcast", True)
    small = settings.precision == "bfloat16" or (settings.precision == "auto" and autocast and bfloat16_is_safe)
    return torch.bfloat16 if small else torch.float32


def _enable_tiling(vae: Any, side: int) -> None:
    """Set the side of the tiles; diffusers VAEs take it as one number, or as height, width and strides."""
    taken = set(inspect.signature(vae.enable_tiling).parameters) if hasattr(vae, "enable_tiling") else set[str]()
    if {"tile_sample_min_height", "tile_sample_stride_height"} <= taken:
        sides = {f"tile_sample_min_{way}": side for way in ("height", "width")}
        strides = {f"tile_sample_stride_{way}": int(side * (1 - OVERLAP)) for way in ("height", "width")}
        vae.enable_tiling(**sides, **strides)
    elif hasattr(vae, "tile_latent_min_size"):
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        if side < 4 * scale:
            raise RecipeError(f"--decoder.tiling {side}: a tile of this VAE has at least {4 * scale} pixels a side.")
        vae.tile_latent_min_size, vae.tile_sample_min_size = side // scale, side // scale * scale
        vae.tile_overlap_factor = OVERLAP
        vae.enable_tiling()
    else:
        raise RecipeError(f"--decoder.tiling: {type(vae).__name__} decodes no tiles of a given side. Leave it out.")


def _checkpoint_decoder(vae: Any) -> None:
    """Checkpoint each call of the decoder (an image, a batch or a tile), and each block inside it.

    Decoders that keep frames between calls, as some video VAEs do, can't be recomputed.
    """
    if not getattr(vae, "_supports_gradient_checkpointing", False):
        raise RecipeError(
            f"--decoder.checkpointing: diffusers' {type(vae).__name__} supports none. Decode fewer images at once "
            "(--rollout.at-once), in slices (--decoder.slicing) or in bfloat16 (--decoder.precision)."
        )
    vae.enable_gradient_checkpointing()
    forward = vae.decoder.forward

    @functools.wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    vae.decoder.forward = again


def _decode_in_own_dtype(vae: Any) -> None:
    """Let the VAE decode in the dtype of its weights, outside autocast."""
    decode = vae.decode

    @functools.wraps(decode)
    def cast(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = next(vae.parameters())
        with memory_of("decoding"), torch.autocast(weight.device.type, enabled=False):
            return decode(z.to(weight.dtype), *args, **kwargs)

    vae.decode = cast


class OffloadedModule:
    """A frozen module whose weights are on the device only from `encode` or `decode` until the backward pass is over.

    The weights never change: they are copied to the device each time, and the copies are dropped.

    Args:
        device: where it computes.
        home: where its weights stay.
    """

    def __init__(self, module: Any, device: torch.device, home: torch.device | str = "cpu") -> None:
        self.device = device
        tensors = [*module.parameters(), *module.buffers()]
        self._weights: list[tuple[Tensor, Tensor]] = [(t, t.data.to(home)) for t in tensors]
        self._graphs: WeakSet[_Graph] = WeakSet()
        for name in ("encode", "decode"):
            if callable(getattr(module, name, None)):
                setattr(module, name, self._visiting(getattr(module, name)))
        self.leave()

    @property
    def here(self) -> bool:
        """Whether the weights are on the device."""
        return any(tensor.data_ptr() != home.data_ptr() for tensor, home in self._weights)

    def arrive(self) -> None:
        """Copy the weights to the device, unless they are there."""
        if not self.here:
            for tensor, home in self._weights:
                tensor.data = home.to(self.device, copy=True)

    def leave(self) -> None:
        """Drop the copies on the device."""
        for tensor, home in self._weights:
            tensor.data = home

    def _visiting(self, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def visit(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.arrive()
            x = x.to(self.device)
            needed = torch.is_grad_enabled() and x.requires_grad
            if needed:
                x = x.view_as(x)
                graph = _Graph()
                self._graphs.add(graph)
                x.register_hook(functools.partial(self._done, graph))
            try:
                return work(x, *args, **kwargs)
            finally:
                if not self._graphs:
                    self.leave()

        return visit

    def _done(self, graph: _Graph, _: Tensor) -> None:
        """Called when the backward pass has reached the input."""
        self._graphs.discard(graph)
        if not self._graphs:
            self.leave()


class _Graph:
    """Marks one decode whose backward pass has not run yet."""
