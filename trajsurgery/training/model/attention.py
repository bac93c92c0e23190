"""Attention kernels by diffusers' names."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from trajsurgery.errors import RecipeError, suggest

KERNELS = {"cuda": ("_native_flash", "_native_efficient", "_native_math"), "cpu": ("_native_math",)}
"""Torch's kernels that are tried in turn where diffusers' default gives a gradient that is not finite."""


def choose(module: Any, name: str, device: torch.device) -> None:
    """Let a diffusers transformer attend with the kernel of this name; "auto" is torch's choice but for cuDNN's.

    On an H100 with torch 2.11 cuDNN's kernel gave gradients that were not finite, or an illegal memory access, at
    FLUX.1-dev's 2537 tokens, where torch's flash attention was right.

    Raises:
        RecipeError: no kernel of this name, or it does not run here.
    """
    if name == "auto":
        if device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    names = [str(backend.value) for backend in AttentionBackendName]
    if name not in names:
        hint = suggest(name, names)
        raise RecipeError(f"--attention {name}: diffusers has no such kernel.{hint} It is auto, {', '.join(names)}.")
    if not hasattr(module, "set_attention_backend"):
        raise RecipeError(f"--attention {name}: diffusers lets nobody choose the kernel of {type(module).__name__}.")
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "an experimental feature"
    try:
        module.set_attention_backend(name)
    except (RuntimeError, ValueError, ImportError) as error:
        raise RecipeError(f"--attention {name} does not run here: {error}") from error
    finally:
        logger.setLevel(level)


def alternatives(module: nn.Module, device: str) -> tuple[str, ...]:
    """Return the names of the kernels that may be tried in place of the default."""
    return KERNELS.get(device, ()) if hasattr(module, "set_attention_backend") else ()
