"""The arguments that tell a model its time: 1-dim tensors of its calls, recorded step by step.

A pipeline expands its timestep to the batch, scales it in its own way and passes it under its own argument name; none
of this is assumed here. Where samples are at different steps, row r of each 1-dim argument is row r of what was
recorded at that sample's step, if the recorded values differ between the rollout's ends (guidance, which does not
change, is left alone). Guidance doubles the batch: row r is sample r % batch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from trajsurgery.errors import SamplerError


class TimestepInputs:
    """The 1-dim arguments of every model call of a rollout."""

    def __init__(self) -> None:
        self._noted: dict[nn.Module, dict[int, list[dict[int, Tensor]]]] = {}
        self._varying: dict[nn.Module, set[int]] = {}

    def note(self, call: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record the 1-dim tensors of a module's call by position, under the number of the scheduler's call."""
        vectors = {i: a.detach().clone() for i, a in enumerate(tree_flatten((args, kwargs))[0]) if _is_vector(a)}
        self._noted.setdefault(module, {}).setdefault(call, []).append(vectors)

    def clear(self) -> None:
        """Drop the calls before the loop."""
        self._noted.clear()
        self._varying.clear()

    @contextlib.contextmanager
    def of_calls(self, calls: Sequence[int]) -> Generator[None]:
        """Inside the block, give every sample's row of the arguments from its own call.

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

        with contextlib.ExitStack() as stack:
            for module in self._noted:
                stack.enter_context(module.register_forward_pre_hook(handed, with_kwargs=True))
            yield

    def _places(self, module: nn.Module, batch: int) -> set[int]:
        """Return the positions of the time arguments. Waits for the device, once for each module.

        Raises:
            SamplerError: there are none.
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


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1
