"""`whole=False`: the rollout ends after the last model call that an output needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.builders.pipelines.checks import flat, gradient, transformers
from tests.builders.pipelines.every import BUILDERS
from tests.builders.pipelines.parts import STEPS
from trajsurgery import SamplerError, backward, draft_lv, drtune, latent, leapalign, operate, refl
from trajsurgery.plans.plan import Plan

ENDS: dict[str, tuple[Plan, int]] = {
    "refl": (refl(3), 3),
    "drtune": (drtune(STEPS, 2, {STEPS, 2}), 2),
    "prediction of x_2": (Plan(latent(STEPS).leap(3).connect().leap(1)), 3),
    "leapalign": (leapalign(STEPS, 2), 1),
    "draft_lv": (draft_lv(1), 1),
    "last step": (refl(1), 1),
}
"""{name: (plan, time of the last model call that it needs)}"""


@pytest.mark.parametrize("memory", ["retain", "recompute"])
@pytest.mark.parametrize("plan, last", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("name", ["Flux", "SD3", "Flux inpaint"])
def test_no_model_call_after_the_last_that_is_needed(name: str, plan: Plan, last: int, memory: Any) -> None:
    small = BUILDERS[name]()
    changes = {"strength": 1.0} if "strength" in small.arguments else {}
    params, count = transformers(small), [0]
    small.pipe.transformer.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    results: list[Any] = []
    for whole in (True, False):
        generator = torch.Generator().manual_seed(0)
        with operate(small.pipe, plan, memory, generator, whole=whole) as surgery:
            count[0] = 0
            images = small(**changes)[0]
            calls = count[0]
        torch.manual_seed(1)
        cotangents = [torch.randn_like(output) for output in surgery.outputs]
        grads = flat(gradient(surgery.outputs, cotangents, params))
        results.append((images.detach(), [o.detach() for o in surgery.outputs], grads, calls))
    (images, outputs, grads, calls), (cut_images, cut_outputs, cut_grads, cut_calls) = results
    assert torch.equal(cut_images, images)
    assert all(torch.equal(a, b) for a, b in zip(cut_outputs, outputs, strict=True))
    assert torch.equal(cut_grads, grads)
    assert calls - cut_calls == last - 1
    assert min(surgery.trajectory.latents) == (last if last > 1 else 0)
    if last > 1:
        with pytest.raises(SamplerError, match="holds no x_0"):
            _ = surgery.trajectory[0]
        backward(plan, surgery.trajectory, surgery.field, cotangents)


def test_several_plans_on_one_rollout_need_the_whole() -> None:
    small = BUILDERS["Flux"]()
    with operate(small.pipe, whole=False) as surgery:
        small()
    assert min(surgery.trajectory.latents) == 0
