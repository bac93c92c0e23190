"""Every pipeline of the table, unmodified: images bit for bit, the whole gradient, all ways of running."""

from __future__ import annotations

import pytest
import torch

from tests.builders.pipelines.checks import measured
from tests.builders.pipelines.every import BUILDERS
from tests.tolerances import STOCK, VALUE
from trajsurgery import apply, backward, leapalign, operate
from trajsurgery.plans.plan import Plan
from trajsurgery.training.training_loop import as_argument


@pytest.mark.parametrize("name", BUILDERS)
def test_operate_is_exact_and_gives_the_whole_gradient(name: str) -> None:
    small = BUILDERS[name]()
    measurements = measured(small)
    assert measurements.exact
    assert measurements.reached, "the gradient reaches other tensors than plain backpropagation does"
    assert measurements.restored
    # transformers cast to float32 inside, and some pipelines run in float32 throughout
    tolerance = STOCK if small.pipe.transformer.dtype == torch.float64 else VALUE[torch.float32]
    assert measurements.by_hand < tolerance
    assert measurements.recompute < tolerance
    assert measurements.split < tolerance
    assert measurements.staged < tolerance


@pytest.mark.parametrize("name", BUILDERS)
def test_generators_are_taken_as_training_passes_them(name: str) -> None:
    """One for each sample, and of a single sample no list, which Wan VACE refuses."""
    small = BUILDERS[name]()
    with operate(small.pipe) as surgery:
        small()
    generators = [torch.Generator().manual_seed(i) for i in range(len(surgery.trajectory[0]))]
    small.pipe(**small.arguments | {"generator": as_argument(generators)})


TURNS = {leapalign(4, 1): (True, True), leapalign(4, 3): (True, False), leapalign(2, 1): (False, True)}
"""{plan: (whether the first transformer trains, whether the second does)}"""


@pytest.mark.parametrize("plan, trained", TURNS.items(), ids=str)
def test_of_two_transformers_only_those_train_that_the_plan_calls(plan: Plan, trained: tuple[bool, bool]) -> None:
    """Wan 2.2 has one above the boundary and one below it; one that the plan does not call gets no gradient."""
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
        has_gradient = tuple(any(p.grad is not None for p in module.parameters()) for module in both)
        assert has_gradient == trained, way
