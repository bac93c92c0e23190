"""What tells a model its time: the vectors among the arguments of its calls, noted step by step in the rollout.

A pipeline expands its timestep to the batch, scales it in its own way and hands it on under a name of its own. None of
this is looked at. Where samples are to be at times of their own, row r of every vector that the model is handed is row
r of what it was handed in the rollout at that sample's step. Guidance doubles the batch: row r is sample r % batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from trajsurgery.errors import SamplerError


class Clock:
    """The vectors of every model call of a rollout."""

    def __init__(self) -> None:
        self._noted: dict[nn.Module, dict[int, list[dict[int, Tensor]]]] = {}
        self._told: bool | None = None

    def note(self, call: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps the 1-dim tensors of a module's call, by their place, under the number of the scheduler's call."""
        found = {i: a.detach().clone() for i, a in enumerate(tree_flatten((args, kwargs))[0]) if _vector(a)}
        self._noted.setdefault(module, {}).setdefault(call, []).append(found)

    def clear(self) -> None:
        """Drops the calls before the loop."""
        self._noted.clear()

    def hands(self, calls: Sequence[int]) -> Callable[[], None]:
        """From now on every sample's row of the vectors is that of its own call, until the returned function is called.

        Args:
            calls: the scheduler's call of each sample, [batch].
        """
        made = Counter[nn.Module]()

        def handed(module: nn.Module, args: Any, kwargs: Any) -> Any:
            noted, made[module] = self._noted[module], made[module] + 1
            try:
                own = [noted[call][made[module] - 1] for call in calls]
                flat, form = tree_flatten((args, kwargs))
                places = [i for i, a in enumerate(flat) if _vector(a) and len(a) % len(own) == 0]
                for i in places:
                    flat[i] = torch.stack([own[r % len(own)][i][r] for r in range(len(flat[i]))])
            except (KeyError, IndexError) as error:
                raise SamplerError(
                    f"{type(module).__name__} is not called alike at all of the times asked for (a model for each part "
                    "of the schedule, guidance in a part of it): samples can't have times of their own there. Take one "
                    "plan for the batch (--rollout.times shared)."
                ) from error
            self._look(module, own, places, calls)
            return tree_unflatten(flat, form)

        handles = [module.register_forward_pre_hook(handed, with_kwargs=True) for module in self._noted]

        def stop() -> None:
            for handle in handles:
                handle.remove()

        return stop

    def _look(self, module: nn.Module, own: list[dict[int, Tensor]], places: list[int], calls: Sequence[int]) -> None:
        """Raises SamplerError unless some vector differs from time to time. Waits for the device, once."""
        if self._told is None:
            other = next(own[i] for i, call in enumerate(calls) if call != calls[0])
            self._told = any(not torch.equal(own[0][i], other[i]) for i in places)
        if not self._told:
            raise SamplerError(
                f"{type(module).__name__} is handed no vector of times, [batch], by this pipeline: samples can't have "
                "times of their own there. Take one plan for the batch (--rollout.times shared)."
            )


def _vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1
