"""Numbers that are not finite: which of an iteration's came first, and for which prompts and seeds.

Flags are computed on the device along with the iteration's figures and come to the host with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trajsurgery.surgery.trajectory import Trajectory, sample_sums

PARTS = ("the plan's output", "the decoder's output", "the reward", "the gradient of reward and decoder")
"""What follows the rollout's velocities, in the order of the data."""

SHOWN = 3
"""So many prompts are named on the terminal; metrics.jsonl has all."""


@dataclass(frozen=True)
class BadNumbers:
    """The samples of an iteration whose first number that is not finite lies in the same part."""

    part: str
    """Such as "the velocity at t = 7"."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    """Of each sample's noise: `torch.Generator().manual_seed(seed)`."""

    def __str__(self) -> str:
        samples = [f"{prompt!r} (seed {seed})" for prompt, seed in zip(self.prompts, self.seeds)]
        more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
        return f"{self.part} is not finite for {', '.join(samples[:SHOWN])}{more}"


def first_not_finite(trajectory: Trajectory, parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return, for each sample, which of its tensors is the first that is not finite. Never waits for the device.

    Args:
        parts: the tensors [batch, ...] of each of `PARTS`, which come after the velocities.

    Returns:
        Float32[batch]: t for the velocity at t, -1, -2, ... for `PARTS`, 0 if all are finite.
    """
    steps = trajectory.steps
    dropped = trajectory.sums
    sums = [dropped[t] if t in dropped else sample_sums(trajectory.velocity(t)) for t in range(steps, 0, -1)]
    sums += [torch.stack([*map(sample_sums, tensors)]).sum(0) for tensors in parts]
    bad = ~torch.stack([x.to(sums[0].device) for x in sums]).isfinite()
    first = bad.int().argmax(0)
    return torch.where(bad.any(0), steps - first - (first >= steps).int(), 0).float()


def name_bad_numbers(
    places: Sequence[int], figures: Mapping[str, bool], prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[BadNumbers, ...]:
    """Return an iteration's numbers that are not finite, by the part that was first; () if there are none.

    Args:
        places: of each sample, as `first_not_finite` returns them.
        figures: whether figures of the whole batch are finite, by name and in the order of the data; the first that is
            not is reported if all of the samples' own numbers are finite.
        prompts, seeds: of each sample.
    """
    result = list[BadNumbers]()
    for place in sorted(set(places) - {0}, reverse=True):
        rows = [i for i, other in enumerate(places) if other == place]
        part = f"the velocity at t = {place}" if place > 0 else PARTS[-place - 1]
        result.append(BadNumbers(part, tuple(prompts[i] for i in rows), tuple(seeds[i] for i in rows)))
    of_batch = [name for name, finite in figures.items() if not finite]
    if of_batch and not result:
        result.append(BadNumbers(of_batch[0], tuple(prompts), tuple(seeds)))
    return tuple(result)
