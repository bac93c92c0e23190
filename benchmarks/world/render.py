"""Scenes to pixels: antialiased shapes on a grey ground, all scenes at once."""

import torch
from torch import Tensor

from trajsurgery.tiny.outlines import distances, offsets
from trajsurgery.tiny.scene import ABSENT, GROUND, PALETTE, SHAPES, SIDE, Scenes


def coverage(scenes: Scenes) -> Tensor:
    """Float[batch slots SIDE SIDE] in [0, 1]: how much of a pixel each object covers; 0 for empty slots."""
    signed = distances(offsets(scenes.centre), scenes.radius)
    index = scenes.shape.clamp(0, len(SHAPES) - 1)[..., None, None, None].expand(-1, -1, 1, SIDE, SIDE)
    covered = (0.5 - signed.gather(2, index).squeeze(2)).clamp(0, 1)
    return covered * (scenes.shape != ABSENT)[..., None, None]


def render(scenes: Scenes) -> Tensor:
    """Scenes to images, Float[batch 3 SIDE SIDE] in [0, 1]. Objects of well-formed scenes do not overlap."""
    covered = coverage(scenes)
    ground = torch.tensor(GROUND).view(1, 3, 1, 1)
    tints = torch.tensor(PALETTE)[scenes.colour.clamp(min=0)] - torch.tensor(GROUND)
    return (ground + torch.einsum("bshw,bsc->bchw", covered, tints)).clamp(0, 1)
