"""Images to scenes by rules alone: colours by nearest tint, blobs by connected components, shapes by best template."""

import torch
from torch import Tensor
from torch.nn import functional

from trajsurgery.tiny.outlines import AREAS, distances, offsets
from trajsurgery.tiny.scene import ABSENT, COLOURS, GROUND, PALETTE, SIDE, SLOTS, UNKNOWN, Scenes

FOUND = SLOTS + 1  # objects looked for: one more than a prompt can ask for, so that extra ones are seen
LEAST_AREA = 20.0  # pixels: the smallest shape of the world covers 37
LEAST_FIT = 0.75  # intersection over union with the best template
EDGES = (1.0, 2.5)  # pixels over which a template's outline fades: crisp, and as a decoder leaves it
FOREIGN = 0.25  # colour distance from every mixture of ground and a palette colour
PIXELS = SIDE * SIDE


def tints(images: Tensor) -> tuple[Tensor, Tensor]:
    """Split each pixel into ground and the palette colour that explains it best.

    Returns Float[batch 4 h w], how much of each pixel is of each colour, 0 unless it is the pixel's own colour; and
    Bool[batch h w], pixels whose colour the world does not have.
    """
    ground = torch.tensor(GROUND).view(3, 1, 1)
    directions = torch.tensor(PALETTE) - torch.tensor(GROUND)
    difference = images - ground
    share = torch.einsum("bchw,kc->bkhw", difference, directions) / directions.square().sum(-1).view(1, -1, 1, 1)
    share = share.clamp(0, 1)
    explained = share[:, :, None] * directions.view(1, len(COLOURS), 3, 1, 1)
    residual = (difference[:, None] - explained).square().sum(2).sqrt()
    nearest = functional.one_hot(residual.argmin(1), len(COLOURS)).permute(0, 3, 1, 2)
    return share * nearest, residual.amin(1) > FOREIGN


def components(mask: Tensor) -> Tensor:
    """Int[batch h w]: 0 outside the mask (Bool[batch h w]), inside it one number in 1..h*w per connected blob."""
    index = torch.arange(1, mask.shape[-1] * mask.shape[-2] + 1, dtype=torch.float32).view(1, *mask.shape[-2:])
    label = index * mask
    while True:
        spread = label
        for _ in range(8):
            spread = functional.max_pool2d(spread[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def _largest(label: Tensor) -> tuple[Tensor, Tensor]:
    """The FOUND largest blobs: Int[batch FOUND] labels and Float[batch FOUND] areas. label: Int[batch pixels]."""
    areas = torch.zeros(label.shape[0], 4 * PIXELS + 1)
    areas.scatter_add_(1, label, torch.ones(label.shape))
    areas[:, 0] = 0
    area, blob = areas.topk(FOUND, 1)
    return blob, area


def _fit(share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best template of each soft blob, Float[... h w]: its shape, intersection over union, centre and radius."""
    area = share.sum((-1, -2)).clamp(min=1e-6)
    axis = torch.arange(SIDE) + 0.5
    centre = torch.stack([(share.sum(-2) * axis).sum(-1), (share.sum(-1) * axis).sum(-1)], -1) / area[..., None]
    radius = (area[..., None] / torch.tensor(AREAS)).sqrt()
    signed, blob = distances(offsets(centre), radius), share[..., None, :, :]
    fits: list[Tensor] = []
    for edge in EDGES:
        template = (0.5 - signed / edge).clamp(0, 1)
        both, either = torch.minimum(template, blob).sum((-1, -2)), torch.maximum(template, blob).sum((-1, -2))
        fits.append(both / either.clamp(min=1e-6))
    fit, shape = torch.stack(fits).amax(0).max(-1)
    return shape, fit, centre, radius.gather(-1, shape[..., None]).squeeze(-1)


def segment(images: Tensor) -> tuple[Scenes, Tensor]:
    """Images, Float[batch 3 SIDE SIDE] in [0, 1], to what they show and the share of junk pixels in them.

    Returns scenes with SLOTS + 1 slots, largest object first, and Float[batch] in [0, 1]. A blob that fits no template
    has shape UNKNOWN. Junk are pixels of a foreign colour and those of blobs too small or too odd to be an object.
    """
    images = images.detach().cpu().float().clamp(0, 1)  # the rules run on the CPU
    share, foreign = tints(images)
    solid = (share >= 0.5) & ~foreign[:, None]
    batch = images.shape[0]
    label = components(solid.flatten(0, 1)).view(batch, len(COLOURS), PIXELS)
    label = (label + torch.arange(len(COLOURS)).view(1, -1, 1) * PIXELS) * (label > 0)
    flat = label.sum(1)  # a pixel is solid in one colour only
    blob, area = _largest(flat)
    present = area >= LEAST_AREA
    member = (flat[:, None] == blob[..., None]) & present[..., None]
    near = functional.max_pool2d(member.view(batch, FOUND, SIDE, SIDE).float(), 5, 1, 2)
    colour = ((blob - 1).clamp(min=0) // PIXELS) * present
    own = share.gather(1, colour[..., None, None].expand(-1, -1, SIDE, SIDE))
    shape, fit, centre, radius = _fit(own * near)
    recognised = present & (fit >= LEAST_FIT)
    junk = foreign.flatten(1) | ((flat > 0) & ~(member & recognised[..., None]).any(1))
    shape = torch.where(recognised, shape, torch.where(present, UNKNOWN, ABSENT))
    return Scenes(shape, colour, centre, radius), junk.float().mean(1)
