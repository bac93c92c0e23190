"""The range of a run's loss, gradient norm and leap distances, and since when an iteration's lie outside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

ABOVE, BELOW, WINDOW, BACK = 10.0, 100.0, 50, 10
"""An iteration is outside if its loss, gradient norm or leap distance (1 / weight) is not finite, or above ABOVE times
the median of the last WINDOW iterations inside; or if its gradient norm is below that median / BELOW though the hinge
is open. BACK iterations inside in a row are a return."""


@dataclass
class LossRange:
    """State of the watch over the loss. Checkpoints hold it."""

    inside: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Of the last WINDOW iterations inside: "loss", "norm" and "distance"."""
    left: int | None = None
    """The first iteration outside that the run has not returned from."""
    in_a_row: int = 0
    """Iterations inside, since the last one outside."""

    def update(self, iteration: int, loss: float, norm: float, weight: float, closed: float) -> None:
        """Record an iteration's figures, as in `StepRecord`."""
        figures = {"loss": loss, "norm": norm, "distance": 1 / weight if weight else math.inf}
        if self._is_inside(figures, closed):
            self.inside = {name: [*self.inside.get(name, ()), value][-WINDOW:] for name, value in figures.items()}
            self.in_a_row += 1
            if self.in_a_row >= BACK:
                self.left = None
        else:
            self.left, self.in_a_row = self.left or iteration, 0

    def _is_inside(self, figures: Mapping[str, float], closed: float) -> bool:
        if not all(map(math.isfinite, figures.values())):
            return False
        middle = {name: median([v for v in values if v > 0] or [0.0]) for name, values in self.inside.items()}
        faded = closed < 1 and figures["norm"] < middle.get("norm", 0.0) / BELOW
        return not faded and all(value <= ABOVE * (middle.get(name) or math.inf) for name, value in figures.items())
