"""`PerSample`: a plan of its own for each sample of a batch. It holds no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trajsurgery.errors import PlanError
from trajsurgery.plans.nodes import Node
from trajsurgery.plans.plan import Plan


@dataclass(frozen=True, init=False)
class PerSample:
    """One plan for each sample of a batch, in the batch's order: other times, or another shape altogether.

    `apply`, `backward`, `values` and `distances` take it as they take a plan. Sample i's gradient is plan i's. A model
    call serves one call of every sample's plan, whatever their times (the field gets sigma [batch]), so that the batch
    costs as many calls as its longest plan.

        PerSample(leapalign(k, j) for k, j in ((18, 7), (22, 3), (11, 10), (25, 16)))

    Raises:
        PlanError: no plans, or plans that differ in their number of outputs.
    """

    plans: tuple[Plan, ...]

    def __init__(self, plans: Iterable[Plan]) -> None:
        given = tuple(plans) if isinstance(plans, Iterable) else (plans,)  # pyright: ignore[reportUnnecessaryIsInstance]
        others = [type(plan).__name__ for plan in given if not isinstance(plan, Plan)]  # pyright: ignore[reportUnnecessaryIsInstance]
        if others or not given:
            received = f"a {others[0]}" if others else "none"
            raise PlanError(
                f"PerSample received {received}: it takes one plan for each sample, [leapalign(18, 7), ...]."
            )
        counts = sorted({len(plan.outputs) for plan in given})
        if len(counts) > 1:
            raise PlanError(
                f"PerSample received plans of {' and '.join(map(str, counts))} outputs: the samples of a batch have "
                "the same number."
            )
        object.__setattr__(self, "plans", given)

    @property
    def exact(self) -> bool:
        """Whether every output's value is the rollout's x_0, bit for bit."""
        return all(plan.exact for plan in self.plans)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node of every plan once."""
        return tuple(dict.fromkeys(node for plan in self.plans for node in plan.nodes))
