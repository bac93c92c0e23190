"""Guidance: both sides in the graph, or the conditional one alone, whatever the order and batching of the calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.builders.pipelines.checks import flat, gap, gradient, transformers
from tests.builders.pipelines.every import BUILDERS
from tests.tolerances import STOCK, VALUE
from trajsurgery import SurgeryError, backward, leapalign, operate
from trajsurgery.pipelines.guidance import GuidancePasses
from trajsurgery.plans.plan import Plan, latent

GUIDED: dict[str, tuple[float, dict[str, float]]] = {
    "SD3": (7.0, {"guidance_scale": 1.0}),  # one batched call, the unconditional half first
    "AuraFlow": (3.5, {"guidance_scale": 1.0}),
    "CogView4": (5.0, {"guidance_scale": 1.0}),  # two calls
    "HiDream": (5.0, {"guidance_scale": 1.0}),  # one call, the velocity's sign turned
    "Flux, true CFG": (3.0, {"true_cfg_scale": 1.0}),
    "Flux2 Klein": (4.0, {"guidance_scale": 1.0}),
    "Z-Image": (6.0, {"guidance_scale": 0.0}),  # c + 5 (c - u), lists, the conditional half first, the sign turned
    "Wan": (5.0, {"guidance_scale": 1.0}),
    "LTX": (3.0, {"guidance_scale": 1.0}),
}
"""{pipeline: (the conditional side's share at the scale of the small one's call, how guidance is switched off)}"""


@pytest.mark.parametrize("name", GUIDED)
def test_the_conditional_side_alone(name: str) -> None:
    """v = u + s (c - u): "conditional" is s times the gradient of a call without guidance, "both" has u's as well."""
    small, (scale, off) = BUILDERS[name](), GUIDED[name]
    params = transformers(small)
    tolerance = STOCK if small.pipe.transformer.dtype == torch.float64 else VALUE[torch.float32]
    plan = Plan(latent(2).leap(0))  # one call of the model on a recorded latent
    found: dict[Any, torch.Tensor] = {}
    for guidance in ("both", "conditional"):
        for memory in ("retain", "recompute"):
            with operate(small.pipe, plan, memory, guidance_gradient=guidance) as surgery:
                small()
            torch.manual_seed(1)
            cotangent = torch.randn_like(surgery.outputs[0])
            found[guidance, memory] = flat(gradient(surgery.outputs, [cotangent], params))
        with operate(small.pipe, plan, "split", guidance_gradient=guidance) as surgery:
            small()
        surgery.outputs[0].backward(cotangent)
        split = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        for p in params:
            p.grad = None
        assert gap(split, found[guidance, "retain"]) < tolerance
        backward(plan, surgery.trajectory, surgery.field, cotangent)
        staged = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        for p in params:
            p.grad = None
        assert gap(staged, found[guidance, "retain"]) < tolerance
        assert gap(found[guidance, "recompute"], found[guidance, "retain"]) < tolerance
    assert gap(found["conditional", "retain"], found["both", "retain"]) > 0.01
    wanted = scale * flat(gradient(unguided(small, surgery, off), [cotangent], params))
    assert gap(found["conditional", "retain"], wanted) < tolerance


def unguided(small: Any, surgery: Any, off: dict[str, float]) -> list[torch.Tensor]:
    """The leap with the conditional velocity alone: the same pipeline called without guidance, entered at x_2."""
    with operate(small.pipe) as plain:
        small(**off)
    trajectory = surgery.trajectory
    sigma = trajectory.sigma(2).to(torch.promote_types(trajectory[2].dtype, torch.float32))
    return [trajectory[2] - (sigma - trajectory.sigma(0)) * plain.field(trajectory[2], trajectory.sigma(2))]


def test_a_distilled_scale_is_an_input() -> None:
    """There is no second side: nothing is cut."""
    small = BUILDERS["Flux"]()
    params = transformers(small)
    grads: list[torch.Tensor] = []
    for guidance in ("both", "conditional"):
        with operate(small.pipe, leapalign(4, 1), guidance_gradient=guidance) as surgery:
            small()
        grads.append(flat(gradient(surgery.outputs, [torch.ones_like(surgery.outputs[0])], params)))
    assert torch.equal(*grads)


def test_the_images_do_not_depend_on_it() -> None:
    small = BUILDERS["SD3"]()
    plain = small()[0]
    with operate(small.pipe, leapalign(4, 1), guidance_gradient="conditional"):
        assert torch.equal(small()[0], plain)
    assert not any(m._forward_hooks for m in (small.pipe.transformer, small.pipe.vae))


def test_another_way_is_refused() -> None:
    with pytest.raises(SurgeryError, match='"both" or "conditional"'):
        operate(BUILDERS["Flux"]().pipe, guidance_gradient="unconditional")  # pyright: ignore[reportArgumentType]


class Doubled(torch.nn.Module):
    """A model of one weight, whose sides are the rows of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.w.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sides_of_a_large_output_are_told_apart_in_any_dtype(dtype):
    """The sum over so many elements is above float16's largest number."""
    model = Doubled()
    told = GuidancePasses([model])
    x = torch.ones(2, 2**18, dtype=dtype, requires_grad=True)
    without, conditional = model(x).chunk(2)
    v = without + 3.5 * (conditional - without)
    told.tell(v)
    (found,) = torch.autograd.grad(v, x, torch.ones_like(v))
    assert found.float().mean(1).tolist() == [0, 7]


class Twice(Doubled):
    """Another model."""


def test_two_models_in_one_step_are_refused():
    first, second = Doubled(), Twice()
    told = GuidancePasses([first, second])
    v = second(first(torch.ones(2, 3)))
    with pytest.raises(SurgeryError, match="Doubled, Twice"):
        told.tell(v[:1] - v[1:])


def test_what_a_given_up_call_left_is_dropped():
    model = Doubled()
    told = GuidancePasses([model])
    model(torch.ones(2, 3))
    told.tell(torch.ones(1, 3))
    assert not told._noted
