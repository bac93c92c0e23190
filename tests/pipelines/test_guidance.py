"""Guidance: both sides in the graph, or only the conditional one, whatever the order and batching of the calls."""

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
"""{pipeline: (factor of the conditional side in the builder's call, arguments that switch guidance off)}"""


@pytest.mark.parametrize("name", GUIDED)
def test_the_conditional_side_has_s_times_the_gradient_without_guidance(name: str) -> None:
    """v = u + s (c - u): "conditional" is s times the gradient of a call without guidance, "both" has u's as well."""
    small, (scale, off) = BUILDERS[name](), GUIDED[name]
    params = transformers(small)
    tolerance = STOCK if small.pipe.transformer.dtype == torch.float64 else VALUE[torch.float32]
    plan = Plan(latent(2).leap(0))  # one call of the model on a recorded latent
    gradients: dict[Any, torch.Tensor] = {}
    for guidance in ("both", "conditional"):
        for memory in ("retain", "recompute"):
            with operate(small.pipe, plan, memory, guidance_gradient=guidance) as surgery:
                small()
            torch.manual_seed(1)
            cotangent = torch.randn_like(surgery.outputs[0])
            gradients[guidance, memory] = flat(gradient(surgery.outputs, [cotangent], params))
        with operate(small.pipe, plan, "split", guidance_gradient=guidance) as surgery:
            small()
        surgery.outputs[0].backward(cotangent)
        split = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        for p in params:
            p.grad = None
        assert gap(split, gradients[guidance, "retain"]) < tolerance
        backward(plan, surgery.trajectory, surgery.field, cotangent)
        staged = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        for p in params:
            p.grad = None
        assert gap(staged, gradients[guidance, "retain"]) < tolerance
        assert gap(gradients[guidance, "recompute"], gradients[guidance, "retain"]) < tolerance
    assert gap(gradients["conditional", "retain"], gradients["both", "retain"]) > 0.01
    expected = scale * flat(gradient(unguided(small, surgery, off), [cotangent], params))
    assert gap(gradients["conditional", "retain"], expected) < tolerance


def unguided(small: Any, surgery: Any, off: dict[str, float]) -> list[torch.Tensor]:
    """The leap with the conditional velocity: a replay at x_2 of the same pipeline called without guidance."""
    with operate(small.pipe) as plain:
        small(**off)
    trajectory = surgery.trajectory
    sigma = trajectory.sigma(2).to(torch.promote_types(trajectory[2].dtype, torch.float32))
    return [trajectory[2] - (sigma - trajectory.sigma(0)) * plain.field(trajectory[2], trajectory.sigma(2))]


def test_a_distilled_guidance_scale_changes_no_gradient() -> None:
    """There is no second side to cut."""
    small = BUILDERS["Flux"]()
    params = transformers(small)
    grads: list[torch.Tensor] = []
    for guidance in ("both", "conditional"):
        with operate(small.pipe, leapalign(4, 1), guidance_gradient=guidance) as surgery:
            small()
        grads.append(flat(gradient(surgery.outputs, [torch.ones_like(surgery.outputs[0])], params)))
    assert torch.equal(*grads)


def test_images_do_not_depend_on_guidance_gradient() -> None:
    small = BUILDERS["SD3"]()
    plain = small()[0]
    with operate(small.pipe, leapalign(4, 1), guidance_gradient="conditional"):
        assert torch.equal(small()[0], plain)
    assert not any(m._forward_hooks for m in (small.pipe.transformer, small.pipe.vae))


def test_an_unknown_guidance_gradient_is_refused() -> None:
    with pytest.raises(SurgeryError, match='"both" or "conditional"'):
        operate(BUILDERS["Flux"]().pipe, guidance_gradient="unconditional")  # pyright: ignore[reportArgumentType]


class Doubled(torch.nn.Module):
    """A model of one weight; the sides of the guidance are the rows of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.w.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sides_of_a_large_output_are_distinguished_in_any_dtype(dtype):
    """The sum over that many elements exceeds float16's largest number."""
    model = Doubled()
    passes = GuidancePasses([model])
    x = torch.ones(2, 2**18, dtype=dtype, requires_grad=True)
    without, conditional = model(x).chunk(2)
    v = without + 3.5 * (conditional - without)
    passes.tell(v)
    (gradient,) = torch.autograd.grad(v, x, torch.ones_like(v))
    assert gradient.float().mean(1).tolist() == [0, 7]


class Twice(Doubled):
    """Another model."""


def test_two_models_in_one_step_are_refused():
    first, second = Doubled(), Twice()
    passes = GuidancePasses([first, second])
    v = second(first(torch.ones(2, 3)))
    with pytest.raises(SurgeryError, match="Doubled, Twice"):
        passes.tell(v[:1] - v[1:])


def test_records_of_an_interrupted_call_are_dropped():
    model = Doubled()
    passes = GuidancePasses([model])
    model(torch.ones(2, 3))
    passes.tell(torch.ones(1, 3))
    assert not passes._noted
