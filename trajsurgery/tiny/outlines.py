"""The outlines of the world's shapes: signed distances to them, and their areas."""

import torch
from torch import Tensor

from trajsurgery.tiny.scene import SIDE

INRADIUS = 0.58  # of a triangle, in units of its nominal radius: its tip then stays inside the quadrant
# Area over squared nominal radius of circle, square, triangle.
AREAS = (torch.pi, 4.0, 3 * 3**0.5 * INRADIUS**2)


def distances(offset: Tensor, radius: Tensor) -> Tensor:
    """Signed distances to the outline of each of SHAPES, in pixels, negative inside.

    offset: Float[... height width 2], pixel centre minus shape centre. radius: Float[...] or, one each, Float[... 3].
    Returns Float[... 3 height width].
    """
    x, y = offset.unbind(-1)
    radii = (radius[..., None].expand(*radius.shape, 3) if radius.dim() == x.dim() - 2 else radius)[..., None, None]
    circle = (x.square() + y.square()).sqrt() - radii[..., 0, :, :]
    square = torch.maximum(x.abs(), y.abs()) - radii[..., 1, :, :]
    slopes = torch.maximum(y, 0.75**0.5 * x.abs() - 0.5 * y)
    triangle = slopes - INRADIUS * radii[..., 2, :, :]
    return torch.stack([circle, square, triangle], -3)


def offsets(centre: Tensor) -> Tensor:
    """Float[... 2] centres to Float[... SIDE SIDE 2] offsets of the pixel centres."""
    axis = torch.arange(SIDE, dtype=centre.dtype, device=centre.device) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1) - centre[..., None, None, :]
