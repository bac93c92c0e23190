"""Callbacks that change more than the latents, such as guidance and prompt embeddings: a replay changes them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback
from peft import LoraConfig

from tests.builders.pipelines.checks import flat, gap, gradient
from tests.builders.pipelines.images import cogview4
from tests.builders.small_pipelines import Small, flux, sd3
from tests.tolerances import GRADIENT
from trajsurgery import PerSample, SamplerError, apply, backward, leapalign, operate

HALF = 2
Callback = Callable[..., dict[str, Any]]


def guidance(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Guidance from the first half on."""
    if step == HALF:
        pipe._guidance_scale = 1.7
    return tensors


def guidance_off(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """No guidance in the second half, by hand as diffusers' documentation shows it."""
    if step == HALF:
        pipe._guidance_scale = 1.0
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            tensors[name] = tensors[name].chunk(2)[-1]
    return tensors


def skipped_layers(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._skip_layer_guidance_scale = 0.5 * step
    return {}


def falling_prompt(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Other embeddings and latents after every step but the last."""
    changed = {"prompt_embeds": tensors["prompt_embeds"] * 0.9, "latents": tensors["latents"] * 0.9}
    return changed if step < 5 else {}


def in_place(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == HALF:
        tensors["prompt_embeds"].mul_(0.5)
    return tensors


def adapter_scale(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The scale of adapters, in the dict that the pipe holds."""
    pipe._joint_attention_kwargs["scale"] = 1.0 - 0.3 * step
    return {}


class Cutoff(SD3CFGCutoffCallback):
    """diffusers' own, for a batch of two: it keeps the last prompt of four."""

    def callback_fn(self, pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return guidance_off(pipeline, step, t, tensors)


def sd3_of(**arguments: Any) -> Small:
    small = sd3(torch.float64)
    return Small(small.pipe, small.arguments | arguments)


def flux_of(**arguments: Any) -> Small:
    small = flux(torch.float64)
    small.pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    small.pipe.transformer.to(torch.float64).requires_grad_()
    generator = torch.Generator().manual_seed(4)
    negative = {
        f"negative_{name}": torch.randn(small.arguments[name].shape, generator=generator, dtype=torch.float64)
        for name in ("prompt_embeds", "pooled_prompt_embeds")
    }
    return Small(small.pipe, small.arguments | negative | {"true_cfg_scale": 2.0} | arguments)


EMBEDS = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
CASES: dict[str, tuple[Callable[[], Small], Any, list[str]]] = {
    "SD3, guidance": (sd3_of, guidance, ["latents"]),
    "SD3, guidance off": (sd3_of, guidance_off, EMBEDS),
    "SD3, diffusers' cutoff": (sd3_of, Cutoff(), []),
    "SD3, prompt in place": (sd3_of, in_place, EMBEDS),
    "SD3, skipped layers": (
        lambda: sd3_of(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0),
        skipped_layers,
        ["latents"],
    ),
    "Flux, prompt and latents": (flux_of, falling_prompt, ["latents", "prompt_embeds"]),
    "Flux, adapters": (flux_of, adapter_scale, ["latents"]),
    "CogView4, guidance": (cogview4, guidance, ["latents"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_changes_are_made_again_in_every_way(case: str) -> None:
    torch.set_num_threads(1)
    build, callback, names = CASES[case]
    small = build()
    call: Callable[[], Any] = lambda: small(  # noqa: E731
        callback_on_step_end=callback,
        **({"callback_on_step_end_tensor_inputs": names} if names else {}),
        **({"joint_attention_kwargs": {"scale": 1.0}} if callback is adapter_scale else {}),  # it writes into the dict
    )
    plain, unchanged = call()[0], small()[0]
    assert not torch.equal(plain, unchanged), "the callback has an effect"
    params = [p for p in small.pipe.transformer.parameters() if p.requires_grad]
    gradients: dict[str, torch.Tensor] = {}
    for memory in ("retain", "recompute", "split"):
        with operate(small.pipe, plan := leapalign(small.arguments["num_inference_steps"] - 1, 1), memory) as surgery:
            assert torch.equal(call()[0], plain)
        torch.manual_seed(1)
        cotangent = torch.randn_like(surgery.outputs[0])
        if memory == "split":
            surgery.outputs[0].backward(cotangent)
            gradients[memory] = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        else:
            gradients[memory] = flat(gradient(surgery.outputs, [cotangent], params))
    trajectory, field, left = surgery.trajectory, surgery.field, dict(vars(small.pipe))
    for p in params:
        p.grad = None
    backward(plan, trajectory, field, cotangent)
    gradients["staged"] = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    for way in ("recompute", "split", "staged"):
        assert gap(gradients[way], gradients["retain"]) <= GRADIENT, way
    with torch.no_grad():
        for t in range(1, trajectory.steps + 1):
            assert torch.equal(field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t)), t
        assert torch.equal(surgery.decode(trajectory[0]), plain)
    assert vars(small.pipe) == left, "a replay leaves the pipe as the call left it"


def test_an_attribute_of_one_s_own_is_what_it_was_at_each_step() -> None:
    """The pipe's call does not set it: a replay begins with the value before the first change."""
    torch.set_num_threads(1)
    small = sd3(torch.float64)
    small.pipe.brightness = 1.0
    scale: Callable[..., Any] = lambda module, args, kwargs: (  # noqa: E731
        args,
        kwargs | {"hidden_states": kwargs["hidden_states"] * getattr(small.pipe, "brightness", 0.5)},
    )
    small.pipe.transformer.register_forward_pre_hook(scale, with_kwargs=True)

    def brighter(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step < 4:
            pipe.brightness = pipe.brightness * 1.1
        else:
            vars(pipe).pop("brightness", None)
        return {}

    with operate(small.pipe) as surgery:
        small(callback_on_step_end=brighter)
    assert not hasattr(small.pipe, "brightness")
    with torch.no_grad():
        for t in range(1, 7):
            x = surgery.trajectory
            assert torch.equal(surgery.field(x[t], x.sigma(t)), x.velocity(t)), t
    assert not hasattr(small.pipe, "brightness")


def test_samples_at_times_between_which_something_changes_are_refused() -> None:
    """One model call has one guidance scale; at times on one side of the change samples may have their own."""
    torch.set_num_threads(1)
    small = sd3(torch.float64)
    with operate(small.pipe) as surgery:
        small(callback_on_step_end=guidance)  # after step 2, of t = 4
    tail = surgery.trajectory, surgery.field
    apply(PerSample([leapalign(6, 3), leapalign(5, 2)]), *tail)
    with pytest.raises(SamplerError, match="one setting"):
        apply(PerSample([leapalign(6, 3), leapalign(3, 2)]), *tail)


def test_an_iteration_before_the_first_changes_nothing() -> None:
    """Where prepared latents are not what the loop begins with, a replay of the first call makes one call before it."""
    torch.set_num_threads(1)
    small = sd3(torch.float64)

    def guidance_at_once(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 2.0
        return {}

    with operate(small.pipe) as surgery:
        small(callback_on_step_end=guidance_at_once)
    surgery.field.record.doubled = True
    x = surgery.trajectory
    with torch.no_grad():
        for t in (6, 5):
            assert torch.equal(surgery.field(x[t], x.sigma(t)), x.velocity(t)), t
