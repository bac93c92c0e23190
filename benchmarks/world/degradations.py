"""Degraded pictures for the reward's training: slightly, so that prompts stay true, or until no prompt is true."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from trajsurgery.tiny.scene import GROUND, SIDE


def degrade(images: Tensor, generator: Generator) -> Tensor:
    """Blur and add noise of random strengths; the content stays visible. Float[batch 3 h w] in [0, 1]."""
    strength = torch.rand(2, images.shape[0], 1, 1, 1, generator=generator)
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    softened = torch.lerp(images, blurred, strength[0])
    noise = torch.randn(images.shape, generator=generator)
    return (softened + 0.08 * strength[1].square() * noise).clamp(0, 1)


def decoded(vae: Any, images: Tensor, generator: Generator, most: float = 0.3) -> Tensor:
    """Encode and decode images, up to `most` of their latents replaced by noise, as by a rough sampler."""
    with torch.no_grad():
        latents = vae.encode(2 * images - 1).latent_dist.mode()
        spread = latents.std()
        sigma = most * torch.rand(images.shape[0], 1, 1, 1, generator=generator).square()
        noisy = (1 - sigma) * latents + sigma * spread * torch.randn(latents.shape, generator=generator)
        return (vae.decode(noisy).sample / 2 + 0.5).clamp(0, 1)


def nonsense(images: Tensor, generator: Generator) -> Tensor:
    """Make pictures of which no prompt is true, from these by turns: blank, blended, warped, noise."""
    batch = images.shape[0]
    kind = torch.arange(batch) % 4
    ground = torch.tensor(GROUND).view(1, 3, 1, 1)
    tint = torch.rand(batch, 3, 1, 1, generator=generator)
    blank = torch.where((torch.arange(batch) % 8 == 0).view(-1, 1, 1, 1), ground, tint).expand_as(images)
    blended = (images + images.roll(1, 0)) / 2
    noise = torch.rand(images.shape, generator=generator)
    choices = torch.stack([blank, blended, warp(images, generator), noise])
    return choices[kind, torch.arange(batch)]


def warp(images: Tensor, generator: Generator) -> Tensor:
    """Bend images by waves so strong that no shape survives. Float[batch 3 h w]."""
    batch = images.shape[0]
    axis = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    phase = 6.3 * torch.rand(batch, 2, 1, 1, generator=generator)
    pace = 10 + 8 * torch.rand(batch, 2, 1, 1, generator=generator)
    bend = 0.25 + 0.2 * torch.rand(batch, 1, 1, generator=generator)
    bent_x = x + bend * torch.sin(pace[:, 0] * y + phase[:, 0])
    bent_y = y + bend * torch.sin(pace[:, 1] * x + phase[:, 1])
    return functional.grid_sample(images, torch.stack([bent_x, bent_y], -1), padding_mode="border", align_corners=False)
