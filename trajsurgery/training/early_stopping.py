"""Early stopping: the best validation round so far, and how many rounds brought nothing better."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """State of early stopping. Checkpoints hold it."""

    last: int = -1
    """The iteration of the last validation round; -1 before the first."""
    best: int = -1
    """The iteration of the best round; -1 before the first round with a finite score."""
    value: float = -math.inf
    """The score of the best round."""
    waited: int = 0
    """The number of rounds since the best one."""

    def update(self, iteration: int, value: float) -> bool:
        """Record the score of a validation round; return whether it is the best so far, which NaN and Inf never are."""
        better = math.isfinite(value) and value > self.value
        if better:
            self.best, self.value, self.waited = iteration, value, 0
        else:
            self.waited += 1
        self.last = iteration
        return better

    def stops(self, patience: int | None) -> bool:
        """Return whether the last `patience` rounds brought no new best; None never stops."""
        return patience is not None and self.waited >= patience
