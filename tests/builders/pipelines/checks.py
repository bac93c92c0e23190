"""Measurements of `operate` on a pipeline: the tests assert them, the benchmark prints them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.builders.pipelines.parts import Small
from trajsurgery import Surgery, backward, leapalign, operate
from trajsurgery.plans.plan import Plan

ALPHA = 0.3


@dataclass
class Measurements:
    """Measurements on one pipeline; differences of gradients are relative."""

    steps: int
    """T."""
    parameters: int
    """The transformers' parameters that the images depend on."""
    exact: bool
    """Images under every block, and every replayed velocity, equal the plain ones bit for bit."""
    reached: bool
    """The parameters with a gradient are those that plain backpropagation through the whole loop reaches."""
    restored: bool
    """The pipe's state after the blocks is that before them."""
    by_hand: float
    """Difference of the gradient under retain from Algorithm 1 written out."""
    recompute: float
    """Difference of the gradient under recompute from that under retain."""
    split: float
    """Difference of the gradient under split from that under retain."""
    staged: float
    """Difference of the gradient by `backward`, after the block has closed, from that under retain."""


def transformers(small: Small) -> list[nn.Parameter]:
    """The parameters of every transformer of the pipe."""
    modules = [m for n, m in small.pipe.components.items() if n.startswith("transformer") and m is not None]
    return [p for module in modules for p in module.parameters()]


def flat(grads: Any) -> Tensor:
    """All gradients as one float64 vector."""
    return torch.cat([g.flatten().double() for g in grads])


def gap(actual: Tensor, expected: Tensor) -> float:
    """The relative difference of two gradients."""
    return float((actual - expected).norm() / expected.norm())


def gradient(outputs: Any, cotangents: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of the outputs; zeros for parameters that they do not depend on."""
    return list(torch.autograd.grad(outputs, params, cotangents, allow_unused=True, materialize_grads=True))


def state(pipe: Any) -> Any:
    """The state of the pipe that a block must restore."""
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    owners = [pipe, pipe.scheduler, *modules]
    return [type(o) for o in owners], [set(o.__dict__) for o in owners], hooks, torch.is_grad_enabled()


def by_hand(surgery: Surgery, k: int, j: int, cotangent: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    """Algorithm 1, lines 16-34, on the pipe's velocities: leap, connector, discount as the paper prints them."""
    trajectory, field = surgery.trajectory, surgery.field
    wide = torch.promote_types(trajectory[k].dtype, trajectory.sigma(k).dtype)
    at = {t: trajectory.sigma(t).to(wide) for t in (k, j, 0)}
    v_k = field(trajectory[k], trajectory.sigma(k))
    predicted = trajectory[k] - (at[k] - at[j]) * v_k
    x_j = predicted + (trajectory[j] - predicted).detach()
    v_j = field(ALPHA * x_j + (1 - ALPHA) * x_j.detach(), trajectory.sigma(j))
    return gradient([x_j - (at[j] - at[0]) * v_j], [cotangent], params)


def plain_gradient(small: Small) -> list[Tensor]:
    """Gradients of plain backpropagation through the pipeline's undecorated loop, without any code of this library."""
    call = inspect.unwrap(type(small.pipe).__call__)
    # Kandinsky's loop writes the next latents into the last ones in place, which torch refuses to differentiate
    with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
        latents = call(small.pipe, **small.again() | {"output_type": "latent", "return_dict": False})[0]
        torch.manual_seed(3)
        return gradient([latents], [torch.randn_like(latents)], transformers(small))


def measured(small: Small) -> Measurements:
    """Measure the pipe without a block, recorded, and in each way of running."""
    params = transformers(small)
    plain = small()[0]
    before = state(small.pipe)
    with operate(small.pipe) as surgery:
        exact = torch.equal(small()[0], plain)
    steps = surgery.trajectory.steps
    plan: Plan = leapalign(steps, 1, ALPHA)
    grads: dict[str, list[Tensor]] = {}
    for memory in ("retain", "recompute"):
        with operate(small.pipe, plan, memory) as surgery:
            exact &= torch.equal(small()[0], plain)
        torch.manual_seed(1)
        cotangent = torch.randn_like(surgery.outputs[0])
        grads[memory] = gradient(surgery.outputs, [cotangent], params)
    for p in params:
        p.grad = None
    with operate(small.pipe, plan, "split") as surgery:
        exact &= torch.equal(small()[0], plain)
    surgery.outputs[0].backward(cotangent)
    grads["split"] = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    trajectory, field = surgery.trajectory, surgery.field
    for p in params:
        p.grad = None
    backward(plan, trajectory, field, cotangent)
    grads["staged"] = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    for p in params:
        p.grad = None
    with torch.no_grad():
        for t in range(1, steps + 1):
            exact &= torch.equal(field(trajectory[t], trajectory.sigma(t)), trajectory.velocity(t))
        exact &= torch.equal(surgery.decode(trajectory[0]), plain)
    hand = by_hand(surgery, steps, 1, cotangent, params)
    depends = [bool(g.any()) for g in plain_gradient(small)]
    return Measurements(
        steps=steps,
        parameters=sum(depends),
        exact=exact,
        reached=any(depends) and [bool(g.any()) for g in grads["retain"]] == depends,
        restored=state(small.pipe) == before and torch.equal(small()[0], plain),
        by_hand=gap(flat(grads["retain"]), flat(hand)),
        recompute=gap(flat(grads["recompute"]), flat(grads["retain"])),
        split=gap(flat(grads["split"]), flat(grads["retain"])),
        staged=gap(flat(grads["staged"]), flat(grads["retain"])),
    )
