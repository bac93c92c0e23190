"""One recomputed call of y = a x + b, by hand: its cost, its value, the settings it restores, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trajsurgery.surgery import autograd_functions


def leaf(value: float, gradient: bool = True) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=gradient)


class Line:
    """y = a x + b; records the settings of each call."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, x: Tensor) -> Tensor:
        flags = torch.backends.cuda
        kernels = (
            flags.flash_sdp_enabled(),
            flags.mem_efficient_sdp_enabled(),
            flags.math_sdp_enabled(),
            flags.cudnn_sdp_enabled(),
        )
        cast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())
        self.seen.append((torch.is_grad_enabled(), x.requires_grad, kernels, cast))
        return self.a * x + self.b


@pytest.mark.parametrize("recorded", [True, False])
def test_each_input_gets_its_gradient(recorded: bool) -> None:
    x, a, b, c = leaf(3), leaf(5), leaf(7), leaf(9)
    line = Line(a, b)
    value = torch.tensor([22.0], dtype=torch.float64)
    out = autograd_functions.recompute(line, x, (a, c, b), value if recorded else None)
    assert out.item() == 22
    assert out is not value
    assert [grad for grad, *_ in line.seen] == ([] if recorded else [False])
    gradients = torch.autograd.grad(out, (x, a, b), torch.tensor([2.0], dtype=torch.float64))
    assert [g.item() for g in gradients] == [10, 6, 2]
    assert [seen[:2] for seen in line.seen[-1:]] == [(True, True)]
    assert len(line.seen) == 2 - recorded
    assert c.grad is None


def test_the_recorded_value_is_copied() -> None:
    value = torch.tensor([22.0], dtype=torch.float64)
    out = autograd_functions.recompute(Line(leaf(5), leaf(7)), leaf(3), (), value)
    with torch.no_grad():
        out.add_(1)
    assert value.item() == 22


@pytest.mark.parametrize(
    "trains", [(True, False, True), (False, True, False), (False, False, True), (True, True, False)]
)
def test_frozen_inputs_get_no_gradient(trains: tuple[bool, bool, bool]) -> None:
    x, a, b = (leaf(value, need) for value, need in zip((3, 5, 7), trains, strict=True))
    autograd_functions.recompute(Line(a, b), x, (a, b), None).backward()
    grads = [None if t.grad is None else t.grad.item() for t in (x, a, b)]
    assert grads == [g if need else None for g, need in zip((5, 3, 1), trains, strict=True)]


@pytest.mark.parametrize("only", range(4))
def test_attention_kernels_are_those_of_the_forward_pass(only: int) -> None:
    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION)
    a = leaf(5)
    line = Line(a, leaf(7))
    with sdpa_kernel([kinds[only]]):
        out = autograd_functions.recompute(line, leaf(3), (a,), None)
    out.backward()
    assert line.seen[0][2] == line.seen[1][2] == tuple(i == only for i in range(4))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_forward_pass(dtype: torch.dtype, cache: bool) -> None:
    a = leaf(5)
    line = Line(a, leaf(7))
    with torch.autocast("cpu", dtype=dtype, cache_enabled=cache):
        out = autograd_functions.recompute(line, leaf(3), (a,), None)
    out.backward()
    assert line.seen[1][3] == (True, dtype, cache)
    plain = Line(a, leaf(7))
    out = autograd_functions.recompute(plain, leaf(3), (a,), None)
    with torch.autocast("cpu", dtype=dtype, cache_enabled=cache):
        out.backward()
    assert plain.seen[1][3][0] is False


def test_the_cotangent_takes_the_call_s_dtype() -> None:
    a = torch.tensor([5.0], requires_grad=True)
    out = autograd_functions.recompute(lambda x: (a * x).bfloat16(), torch.tensor([3.0]), (a,), torch.tensor([15.0]))
    out.backward(torch.tensor([2.0]))
    assert a.grad is not None
    assert a.grad.item() == 6


def test_second_derivatives_changed_weights_and_detached_calls_are_refused() -> None:
    a = leaf(5)
    out = autograd_functions.recompute(Line(a, leaf(7)), leaf(3), (a,), None)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(out, a, create_graph=True)
    out = autograd_functions.recompute(Line(a, leaf(7)), leaf(3), (a,), None)
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between"):
        out.backward()
    with pytest.raises(RuntimeError, match="carries no gradient"):
        autograd_functions.recompute(lambda x: (a * x).detach(), leaf(3), (a,), None).backward()


def test_scale_by_one_is_the_input_and_by_zero_a_detach() -> None:
    x = leaf(3)
    assert autograd_functions.scale(x, 1) is x
    assert autograd_functions.scale(x, 1.0) is x
    assert not autograd_functions.scale(x, 0).requires_grad
    assert not autograd_functions.scale(x, 0.0).requires_grad
    for factor in (0.5, 2, 3.0):
        (gradient,) = torch.autograd.grad(autograd_functions.scale(x, factor), x)
        assert gradient.item() == factor


def test_a_gate_reads_its_rows_in_the_backward_pass() -> None:
    x = torch.arange(6, dtype=torch.float64).reshape(3, 2).requires_grad_()
    gate = autograd_functions.Gate()
    out = autograd_functions.gated(x, gate)
    assert torch.equal(out, x)
    cotangent = torch.arange(1, 7, dtype=torch.float64).reshape(3, 2)
    assert torch.equal(torch.autograd.grad(out, x, cotangent, retain_graph=True)[0], cotangent)
    gate.rows = torch.tensor([True, False, True])
    assert torch.autograd.grad(out, x, cotangent)[0].tolist() == [[1, 2], [0, 0], [5, 6]]


def test_values_are_copies() -> None:
    x, real = leaf(3), leaf(4, gradient=False)
    for out in (autograd_functions.connect(x, real), autograd_functions.scale(x, 0.5)):
        with torch.no_grad():
            out.add_(1)
    assert (x.item(), real.item()) == (3, 4)
