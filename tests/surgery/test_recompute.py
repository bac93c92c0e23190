"""recompute: the model is run again in the backward pass, one call at a time, as it was run in the forward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.builders.problems import cotangents, distance, grads, outputs, problem
from tests.tolerances import EXACT
from trajsurgery import Plan, apply, draft_lv, drtune, latent, leapalign, leaps, refl
from trajsurgery.surgery import autograd_functions
from trajsurgery.testing import MLP

PLANS = {
    "leapalign": leapalign(6, 3, 0.3),
    "drtune": drtune(8, 2, {7, 3}),
    "refl": refl(4),
    "draft_lv": draft_lv(2),
    "three leaps": leaps((8, 5, 2), 0.5),
}
PROMISED = {"leapalign": (0, 2), "drtune": (0, 2), "refl": (0, 1), "draft_lv": (2, 3), "three leaps": (0, 3)}
"""Calls in the forward pass (none for a call the rollout has recorded), and in the backward pass (one each)."""


class Counting(MLP):
    """Counts its calls."""

    calls = 0

    def forward(self, x, sigma):
        self.calls += 1
        return super().forward(x, sigma)


@pytest.mark.parametrize("name", PLANS)
def test_each_call_is_made_once_in_the_backward_pass(name):
    field = Counting(4, seed=3)
    p = problem(field)
    field.calls = 0
    out = outputs(apply(PLANS[name], p.trajectory, field, "recompute"))
    forward, backward = PROMISED[name]
    assert field.calls == forward == PLANS[name].cost(p.trajectory).extra
    grads(out, p.params, cotangents(out))
    assert field.calls == forward + backward


@pytest.mark.parametrize("name", PLANS)
def test_no_activation_is_saved(name, rolled):
    """The graph holds no tensor of the hidden width."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    field = MLP(4, hidden=77, seed=1)
    p = problem(field)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        apply(PLANS[name], p.trajectory, field, "recompute")
    assert all(77 not in shape for shape in shapes)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        apply(PLANS[name], p.trajectory, field, "retain")
    assert any(77 in shape for shape in shapes)


def test_the_gradient_survives_hooks_on_saved_tensors(rolled):
    """save_on_cpu returns copies of saved tensors: gradients of parameters among them were lost without an error."""
    plan = leapalign(6, 3, 0.3)
    expected = torch.autograd.grad(apply(plan, rolled.trajectory, rolled.field).sum(), rolled.params)
    with torch.autograd.graph.save_on_cpu():
        out = apply(plan, rolled.trajectory, rolled.field, "recompute")
    actual = torch.autograd.grad(out.sum(), rolled.params, allow_unused=True)
    assert all(g is not None for g in actual)
    assert distance(actual, expected) <= EXACT


def test_parameters_shared_between_calls_add_up(rolled):
    plan = leaps((8, 5, 2), 0.5)
    for p in rolled.params:
        p.grad = torch.ones_like(p)
    apply(plan, rolled.trajectory, rolled.field, "recompute").sum().backward()
    expected = torch.autograd.grad(apply(plan, rolled.trajectory, rolled.field).sum(), rolled.params)
    assert distance([p.grad - 1 for p in rolled.params], expected) <= 1e-12


def test_frozen_parameters_stay_without_gradient(rolled):
    frozen, *trained = rolled.params
    frozen.requires_grad_(False)
    apply(leapalign(6, 3, 0.3), rolled.trajectory, rolled.field, "recompute").sum().backward()
    assert frozen.grad is None
    assert all(p.grad.abs().max() > 0 for p in trained)


def test_a_parameter_changed_in_place_is_refused(rolled):
    out = apply(leapalign(6, 3, 0.3), rolled.trajectory, rolled.field, "recompute")
    with torch.no_grad():
        rolled.params[0].add_(1.0)
    with pytest.raises(RuntimeError, match="in place"):
        out.sum().backward()


def test_a_second_derivative_is_refused(rolled):
    out = apply(leapalign(6, 3, 0.3), rolled.trajectory, rolled.field, "recompute")
    with pytest.raises(RuntimeError, match="first-order only"):  # it was a constant, without an error
        torch.autograd.grad(out.sum(), rolled.params, create_graph=True)


class Watching(torch.nn.Module):
    """An attention module that records the autocast and kernel settings of each call."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x, sigma):
        sdp = torch.backends.cuda
        self.seen.append(
            (
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                sdp.math_sdp_enabled(),
                sdp.flash_sdp_enabled(),
                sdp.mem_efficient_sdp_enabled(),
            )
        )
        y = self.inner(x).unsqueeze(0)
        return torch.nn.functional.scaled_dot_product_attention(y, y, y).squeeze(0).to(x.dtype)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kernel", [SDPBackend.MATH, None])
def test_autocast_and_attention_kernels_are_restored(autocast, kernel):
    field = Watching()
    p = problem(MLP(4))
    x, sigma = p.trajectory[3].float(), p.sigmas[3].float()
    kernels = sdpa_kernel(kernel) if kernel else sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), kernels:
        value = field(x, sigma).detach()
        out = autograd_functions.recompute(lambda x: field(x, sigma), x, tuple(field.parameters()), value)
        inside = field.seen[-1]
    outside = torch.is_autocast_enabled("cpu"), torch.backends.cuda.flash_sdp_enabled()
    out.sum().backward()
    assert field.seen[-1] == inside
    assert inside[0] == autocast
    assert (torch.is_autocast_enabled("cpu"), torch.backends.cuda.flash_sdp_enabled()) == outside
    assert all(p.grad is not None for p in field.parameters())


def test_nested_recomputes_run_one_at_a_time():
    """The backward pass of one call ends before the next call's begins."""
    live, most = [0], [0]

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            live[0] += 1
            most[0] = max(most[0], live[0])
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            live[0] -= 1
            return g

    field = MLP(4, seed=3)
    p = problem(field)
    marked = lambda x, sigma: field(Mark.apply(x) if torch.is_grad_enabled() else x, sigma)  # noqa: E731
    x = latent(8)
    for t in range(8, 0, -1):
        x = x.leap(t - 1)
    out = apply(Plan(x), p.trajectory, marked, "recompute", params=field.parameters())
    assert live[0] == 0
    out.sum().backward()
    assert most[0] == 1
