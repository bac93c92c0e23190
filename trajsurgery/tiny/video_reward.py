"""The motion reward: does the requested shape move where the prompt says? Differentiable; nothing is learned."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trajsurgery.errors import RewardError
from trajsurgery.tiny.outlines import AREAS, distances, offsets
from trajsurgery.tiny.scene import GROUND, PALETTE, SIDE
from trajsurgery.tiny.scorer import check_prompt_count, check_range
from trajsurgery.tiny.video import UNITS, Motion, understand

PURE = 0.15  # colour distance from the line between ground and the asked colour at which a pixel counts for less
AREA = (34.0, 130.0)  # pixels: the world's smallest and largest shapes
EDGE = 1.5  # pixels over which the outline fades that a blob is compared with
STRICT = 4  # power of a blob's overlap with that outline
FLOOR = 0.05  # added to each frame's score: one blank frame does not silence the others
STRANGE = 20.0  # pixels of another colour that halve the score
PACE = 8.0  # pixels of displacement along which the score rises most


class MotionReward:
    """reward(frames, prompts) -> scores in [0, 1], Float[batch]: `there` x `moves`.

    frames: Float[batch frames 3 32 32] in [0, 1], frames >= 2. Each pixel weighs as much as it has of the colour asked
    for; a frame's blob has an area and a centre. `there` is the frames' geometric mean (none can be given up) of: the
    area is that of a shape, the blob overlaps (Dice, to the power of STRICT) with the shape asked for at its centre, as
    large as it is, and nothing of another colour is in the frame. `moves` is (1 + tanh((along - across) / PACE)) / 2
    of the line fitted to the centres.

    What can be hacked: a shape is a matter of degree. A circle in place of a square keeps about nine tenths of the
    score, where the rules (`judge`) say no; and a shape may jump, which the rules do not see either.
    """

    name = "tiny-motion"
    scale = "share, in [0, 1]"
    threshold = 0.86

    def __call__(self, frames: Tensor, prompts: Sequence[Motion | str]) -> Tensor:
        """The scores. Raises RewardError for frames of another shape or range, or another number of prompts."""
        _check(frames, prompts)
        motions = understand(prompts)
        weight, strange = _colour(frames, motions)
        axis = torch.arange(SIDE, dtype=frames.dtype, device=frames.device) + 0.5
        area = weight.sum((-1, -2))
        mass = area.clamp(min=1.0)
        centre = torch.stack([(weight.sum(-2) * axis).sum(-1), (weight.sum(-1) * axis).sum(-1)], -1) / mass[..., None]
        least, most = AREA
        whole = (area / least).clamp(max=1) * (most / area.clamp(min=least)).clamp(max=1)
        shaped = _overlap(weight, centre, mass, motions) ** STRICT
        alone = 1 / (1 + (strange / STRANGE).square())
        presence = (whole * shaped * alone + FLOOR).log().mean(1).exp() - FLOOR
        return presence * _moves(centre, motions)


def _colour(frames: Tensor, motions: Sequence[Motion]) -> tuple[Tensor, Tensor]:
    """Each pixel's weight in the asked colour, Float[batch frames h w], and pixels of others, Float[batch frames]."""
    ground = frames.new_tensor(GROUND).view(3, 1, 1)
    tint = frames.new_tensor([PALETTE[p.colour] for p in motions]).view(-1, 1, 3, 1, 1) - ground
    length = tint.square().sum(2)
    difference = frames - ground
    share = (difference * tint).sum(2) / length
    off = (difference - share[:, :, None] * tint).square().sum(2)
    # Squared: the noise of a decoder in a thousand pixels of ground must not outweigh a shape.
    weight = share.clamp(0, 1).square() * (-off / (2 * PURE**2)).exp()
    strange = ((1 - weight) * difference.square().sum(2) / length).sum((-1, -2))
    return weight, strange


def _overlap(weight: Tensor, centre: Tensor, area: Tensor, motions: Sequence[Motion]) -> Tensor:
    """Dice's coefficient of each blob and the shape asked for, at its centre and of its area, Float[batch frames]."""
    shape = torch.tensor([p.shape for p in motions], device=weight.device)
    radius = (area[..., None] / weight.new_tensor(AREAS)).sqrt()
    signed = distances(offsets(centre), radius)[torch.arange(len(motions), device=weight.device), :, shape]
    template = (0.5 - signed / EDGE).clamp(0, 1)
    both, each = (weight * template).sum((-1, -2)), (weight.square() + template.square()).sum((-1, -2))
    return 2 * both / each


def _moves(centre: Tensor, motions: Sequence[Motion]) -> Tensor:
    """Float[batch] in [0, 1]; centre: Float[batch frames 2]."""
    count = centre.shape[1]
    time = torch.linspace(-0.5, 0.5, count, dtype=centre.dtype, device=centre.device)
    moved = (time[:, None] * centre).sum(1) / time.square().sum()
    unit = centre.new_tensor([UNITS[p.direction] for p in motions])
    along = (moved * unit).sum(-1)
    across = (moved[:, 0] * unit[:, 1] - moved[:, 1] * unit[:, 0]).abs()
    return (1 + ((along - across) / PACE).tanh()) / 2


def _check(frames: Tensor, prompts: Sequence[Motion | str]) -> None:
    shape = tuple(frames.shape)
    if len(shape) != 5 or shape[1] < 2 or shape[2:] != (3, SIDE, SIDE) or not frames.is_floating_point():
        raise RewardError(
            f"MotionReward takes videos, Float[batch, frames >= 2, 3, {SIDE}, {SIDE}] in [0, 1]; received {shape} of "
            f"{frames.dtype}. Call the pipe with height={SIDE}, width={SIDE}, num_frames=5, output_type='pt'."
        )
    check_prompt_count(MotionReward.name, frames, prompts)
    check_range(MotionReward.name, frames)
