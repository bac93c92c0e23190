"""What `operate` promises of a pipeline, measured: the tests assert it, the benchmark prints it."""

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
class Found:
    """The measurements on one pipeline."""

    steps: int
    """T."""
    parameters: int
    """The transformers' tensors that the images depend on."""
    exact: bool
    """Images under every block, and every velocity entered again, equal the plain ones bit for bit."""
    reached: bool
    """The tensors with a gradient are those that plain backpropagation through the whole loop reaches."""
    restored: bool
    """Nothing is left on the pipe."""
    by_hand: float
    """Relative difference of the retained gradient from Algorithm 1 written out."""
    recompute: float
    """Of the recomputed from the retained one."""
    split: float
    """Of the split one, whose calls are the rollout's own."""
    staged: float
    """Of the staged one, after the block has closed."""


def transformers(small: Small) -> list[nn.Parameter]:
    """The tensors of every transformer of the pipe."""
    modules = [m for n, m in small.pipe.components.items() if n.startswith("transformer") and m is not None]
    return [p for module in modules for p in module.parameters()]


def flat(grads: Any) -> Tensor:
    """One vector."""
    return torch.cat([g.flatten().double() for g in grads])


def gap(found: Tensor, wanted: Tensor) -> float:
    """The relative difference of two gradients."""
    return float((found - wanted).norm() / wanted.norm())


def gradient(outputs: Any, cotangents: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """Zeros where nothing arrives."""
    return list(torch.autograd.grad(outputs, params, cotangents, allow_unused=True, materialize_grads=True))


def state(pipe: Any) -> Any:
    """What a block may not change."""
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


def plainly(small: Small) -> list[Tensor]:
    """Plain backpropagation through the pipeline's undecorated loop: no line of ours."""
    call = inspect.unwrap(type(small.pipe).__call__)
    # Kandinsky's loop writes the next latents into the last's: torch refuses to go back through that
    with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
        latents = call(small.pipe, **small.again() | {"output_type": "latent", "return_dict": False})[0]
        torch.manual_seed(3)
        return gradient([latents], [torch.randn_like(latents)], transformers(small))


def measured(small: Small) -> Found:
    """Runs the pipe plainly, recorded, retained, recomputed and staged."""
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
    wanted = [bool(g.any()) for g in plainly(small)]
    return Found(
        steps=steps,
        parameters=sum(wanted),
        exact=exact,
        reached=any(wanted) and [bool(g.any()) for g in grads["retain"]] == wanted,
        restored=state(small.pipe) == before and torch.equal(small()[0], plain),
        by_hand=gap(flat(grads["retain"]), flat(hand)),
        recompute=gap(flat(grads["recompute"]), flat(grads["retain"])),
        split=gap(flat(grads["split"]), flat(grads["retain"])),
        staged=gap(flat(grads["staged"]), flat(grads["retain"])),
    )
