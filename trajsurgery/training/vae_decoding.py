"""How a frozen VAE decodes with gradient: in tiles, recomputed, in float32, and on the device only while it does."""

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
from trajsurgery.training.settings import Decoder

OVERLAP = 0.25
"""Of a tile's side with the next one's: diffusers' own."""


def prepare(vae: Any, settings: Decoder, autocast: bool = False) -> None:
    """Makes a VAE decode as the settings say, whoever calls it.

    Args:
        vae: frozen, where it is to decode.
        autocast: whether the transformer runs in bfloat16 (precision "auto").

    Raises:
        RecipeError: its class has no tiles, slices or gradient checkpointing.
    """
    wanted = dtype(vae, settings, autocast)
    if any(p.dtype != wanted for p in vae.parameters()):  # the dry run's parameters can't be moved
        nn.Module.to(vae, wanted)
    if settings.tiling is not None:
        _tile(vae, settings.tiling)
    if settings.slicing:
        if not hasattr(vae, "use_slicing"):
            raise RecipeError(f"--decoder.slicing: {type(vae).__name__} decodes no slices. Leave it out.")
        vae.enable_slicing()
    if settings.checkpointing:
        _recompute(vae)
    _cast(vae)
    device = next(vae.parameters()).device
    if not settings.stay and device.type != "cpu":
        OffloadedModule(vae, device)


def dtype(vae: Any, settings: Decoder, autocast: bool) -> torch.dtype:
    """That of the VAE's weights; a VAE whose config is silent may overflow."""
    safe = not getattr(vae.config, "force_upcast", True)
    small = settings.precision == "bfloat16" or (settings.precision == "auto" and autocast and safe)
    return torch.bfloat16 if small else torch.float32


def _tile(vae: Any, side: int) -> None:
    """Sets the side of the tiles: diffusers has it as one number, or as height, width and strides."""
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


def _recompute(vae: Any) -> None:
    """Keeps the input of each call of the decoder, which is an image's, a batch's or a tile's, and then of each block.

    Decoders that remember frames from call to call, as those of some videos, can't be called again.
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


def _cast(vae: Any) -> None:
    """Whatever the pipe's latents are, the VAE decodes them in its own dtype, outside of autocast."""
    decode = vae.decode

    @functools.wraps(decode)
    def cast(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = next(vae.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            return decode(z.to(weight.dtype), *args, **kwargs)

    vae.decode = cast


class OffloadedModule:
    """A frozen module whose weights are on the device from a call of its `encode` or `decode` to the backward pass.

    They never change: the copies on the device are made anew each time, and dropped.

    Args:
        device: where it works.
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
        """Whether it is on the device."""
        return any(tensor.data_ptr() != kept.data_ptr() for tensor, kept in self._weights)

    def arrive(self) -> None:
        """Copies the weights to the device, if they are not there."""
        if not self.here:
            for tensor, kept in self._weights:
                tensor.data = kept.to(self.device, copy=True)

    def leave(self) -> None:
        """Drops the copies."""
        for tensor, kept in self._weights:
            tensor.data = kept

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
        """The backward pass has come through to the input."""
        self._graphs.discard(graph)
        if not self._graphs:
            self.leave()


class _Graph:
    """Lives as long as a decoding's graph does."""
