"""What a picture of the embedded world holds: one to three coloured shapes, each in a quadrant of its own."""

from dataclasses import dataclass

from torch import Tensor

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
RELATIONS = ("left of", "right of", "above", "below")

SIDE = 32  # pixels
SLOTS = 3  # the most objects a prompt can ask for
ABSENT = -1  # the shape of an empty slot
ANY = -1  # the colour of an object whose prompt names none; the relation of a prompt without one
UNKNOWN = len(SHAPES)  # the shape of a blob that is none of the three; no prompt asks for it

APART = 8.0  # pixels between two centres for a relation to hold: jitter reaches 3, two quadrants leave at least 13

GROUND = (0.5, 0.5, 0.5)
PALETTE = ((0.85, 0.12, 0.12), (0.1, 0.68, 0.2), (0.12, 0.22, 0.9), (0.95, 0.85, 0.08))


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes. Slots beyond the last object have shape ABSENT.

    shape: Int[batch slots], index into SHAPES, UNKNOWN or ABSENT. colour: Int[batch slots], index into COLOURS.
    centre: Float[batch slots 2], (x, y) in pixels, x to the right and y downwards. radius: Float[batch slots], pixels.
    """

    shape: Tensor
    colour: Tensor
    centre: Tensor
    radius: Tensor

    @property
    def count(self) -> Tensor:
        """Int[batch]: how many objects each scene has."""
        return (self.shape != ABSENT).sum(-1)

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, index: Tensor | slice) -> "Scenes":
        return Scenes(self.shape[index], self.colour[index], self.centre[index], self.radius[index])
