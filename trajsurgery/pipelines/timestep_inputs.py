"""What tells a model its time: the vectors among the arguments of its calls, noted step by step in the rollout.

A pipeline expands its timestep to the batch, scales it in its own way and hands it on under a name of its own. None of
this is looked at. Where samples are to be at times of their own, row r of every vector that the model is handed is row
r of what it was handed in the rollout at that sample's step, if the rollout handed it another at its end than at its
beginning: guidance, which does not change, is left as it is. Guidance doubles the batch: row r is sample r % batch.
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
        self._varying: dict[nn.Module, set[int]] = {}

    def note(self, call: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keeps the 1-dim tensors of a module's call, by their place, under the number of the scheduler's call."""
        found = {i: a.detach().clone() for i, a in enumerate(tree_flatten((args, kwargs))[0]) if _vector(a)}
        self._noted.setdefault(module, {}).setdefault(call, []).append(found)

    def clear(self) -> None:
        """Drops the calls before the loop."""
        self._noted.clear()
        self._varying.clear()

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
                for i in self._places(module, len(own)):
                    flat[i] = torch.stack([own[r % len(own)][i][r] for r in range(len(flat[i]))])
            except (KeyError, IndexError) as error:
                raise SamplerError(
                    f"{type(module).__name__} is not called alike at all of the times asked for (a model for each part "
                    "of the schedule, guidance in a part of it): samples can't have times of their own there. Take one "
                    "plan for the batch (--rollout.times shared)."
                ) from error
            return tree_unflatten(flat, form)

        handles = [module.register_forward_pre_hook(handed, with_kwargs=True) for module in self._noted]

        def stop() -> None:
            for handle in handles:
                handle.remove()

        return stop

    def _places(self, module: nn.Module, batch: int) -> set[int]:
        """Where the module is handed its time. Waits for the device, once a module.

        Raises:
            SamplerError: nowhere.
        """
        if module not in self._varying:
            noted = self._noted[module]
            pairs = zip(noted[min(noted)], noted[max(noted)])
            both = [(i, first[i], last[i]) for first, last in pairs for i in first.keys() & last.keys()]
            self._varying[module] = {i for i, a, b in both if len(a) % batch == 0 and not torch.equal(a, b)}
        if not self._varying[module]:
            raise SamplerError(
                f"{type(module).__name__} is handed no vector of times, [batch], by this pipeline: samples can't have "
                "times of their own there. Take one plan for the batch (--rollout.times shared)."
            )
        return self._varying[module]


def _vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1
