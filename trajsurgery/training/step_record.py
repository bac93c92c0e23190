"""The record of one iteration: a line of metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trajsurgery.training.faults.bad_numbers import BadNumbers


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl. Means are over the batch."""

    kind: Literal["iteration"] = field(default="iteration", kw_only=True)
    iteration: int
    """From 1."""
    reward: float
    """Of the generated images x_0, whatever the plan's output is."""
    loss: float
    grad_norm: float
    """Before clipping."""
    clamped: float
    """The share of distances below tau. Near 1, tau is too large and weights no longer differ."""
    weight: float
    closed: float
    """The share of scores at or above lambda, which give no gradient."""
    skipped: bool
    """Whether loss or gradient were not finite, so that nothing changed."""
    times: tuple[int, ...]
    """Times of the plan's model calls."""
    seconds: float
    idle: tuple[str, ...] | None = None
    """Trained parameters without gradient (missing_gradients.py); looked for once, in the first iteration with a loss.
    """
    bad: tuple[BadNumbers, ...] = ()
    """Of a skipped iteration: where numbers first were not finite, with prompts and seeds."""
    anchor: float | None = None
    """mean (v - v_base)^2 at a drawn time (anchor.py), if there is an anchor. It is not part of `loss`."""
    distance: float = 0.0
    """Mean |x_t - prediction| of the leaps that the weights measure; 0 if they measure none."""
    parts: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds by part; on a GPU by its own clock, but for the optimiser's step, by the host's."""
    memory: float = 0.0
    """GiB at the peak of the run so far: of this rank's tensors on a GPU, else of the process."""
