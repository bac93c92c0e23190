"""Every pipeline of the table, unmodified: images bit for bit, the whole gradient, all ways of running."""

from __future__ import annotations

import pytest
import torch

from tests.builders.pipelines.checks import measured
from tests.builders.pipelines.every import BUILDERS
from tests.tolerances import STOCK, VALUE
from trajsurgery import apply, backward, leapalign, operate
from trajsurgery.plans.plan import Plan


@pytest.mark.parametrize("name", BUILDERS)
def test_operate_keeps_its_promises(name: str) -> None:
    small = BUILDERS[name]()
    found = measured(small)
    assert found.exact
    assert found.reached, "the gradient reaches other tensors than plain backpropagation does"
    assert found.restored
    # transformers cast to float32 inside, and some pipelines run in float32 throughout
    tolerance = STOCK if small.pipe.transformer.dtype == torch.float64 else VALUE[torch.float32]
    assert found.by_hand < tolerance
    assert found.recompute < tolerance
    assert found.split < tolerance
    assert found.staged < tolerance


TURNS = {leapalign(4, 1): (True, True), leapalign(4, 3): (True, False), leapalign(2, 1): (False, True)}
"""{plan: (whether the first transformer trains, the second)}"""


@pytest.mark.parametrize("plan, trained", TURNS.items(), ids=str)
def test_of_two_transformers_that_take_turns_those_train_that_the_plan_calls(
    plan: Plan, trained: tuple[bool, bool]
) -> None:
    """Wan 2.2: one above the boundary, one below it; no gradient is left where the plan makes no call."""
    pipe = (small := BUILDERS["Wan 2.2"]()).pipe
    both, count = (pipe.transformer, pipe.transformer_2), {"transformer": 0, "transformer_2": 0}
    for name in count:
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: count.__setitem__(name, count[name] + 1))
    with operate(pipe, plan) as surgery:
        small()
    assert count == {"transformer": 4, "transformer_2": 4}  # two steps each, two sides of guidance
    trajectory, field = surgery.trajectory, surgery.field
    cotangent = torch.ones_like(surgery.outputs[0])
    ways = {
        "retain": lambda: surgery.outputs[0].backward(cotangent),
        "recompute": lambda: torch.autograd.backward(apply(plan, trajectory, field, "recompute"), cotangent),
        "staged": lambda: backward(plan, trajectory, field, cotangent),
    }
    for way, run in ways.items():
        for module in both:
            module.zero_grad()
        run()
        found = tuple(any(p.grad is not None for p in module.parameters()) for module in both)
        assert found == trained, way
