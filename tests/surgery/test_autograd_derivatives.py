"""Derivatives of connect and scale: backward, jvp, vmap, and torch.func's compositions of them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from trajsurgery.surgery import autograd_functions

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REAL = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TANGENT = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

OPS = {
    "connect": (lambda x: autograd_functions.connect(x, REAL), 1.0),
    "scale 0": (lambda x: autograd_functions.scale(x, 0.0), 0.0),
    "scale 0.3": (lambda x: autograd_functions.scale(x, 0.3), 0.3),
    "scale 1": (lambda x: autograd_functions.scale(x, 1.0), 1.0),
    "scale 2.5": (lambda x: autograd_functions.scale(x, 2.5), 2.5),
}
CASES = pytest.mark.parametrize("run, factor", OPS.values(), ids=list(OPS))


@CASES
def test_backward_scales_the_cotangent(run, factor):
    x = X.clone().requires_grad_()
    out = run(x)
    assert out.requires_grad == (factor != 0)
    if factor:
        assert torch.equal(torch.autograd.grad(out, x, TANGENT)[0], factor * TANGENT)


@CASES
def test_jvp_scales_the_tangent(run, factor):
    _, pushed = jvp(run, (X,), (TANGENT,))
    assert torch.equal(pushed, factor * TANGENT)


@CASES
def test_forward_ad_scales_the_tangent(run, factor):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(X, TANGENT))).tangent
    assert tangent is None if factor == 0 else torch.equal(tangent, factor * TANGENT)


@pytest.mark.parametrize("real", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prediction", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_has_the_prediction_s_dtype_and_a_tangent_the_value_s(prediction, real):
    x, value = X.to(prediction), REAL.to(real)
    connected, pull = vjp(lambda x: autograd_functions.connect(x, value), x)
    cotangent = TANGENT.to(real)
    (gradient,) = pull(cotangent)
    assert (connected.dtype, gradient.dtype) == (real, prediction)
    assert torch.equal(gradient, cotangent.to(prediction))
    _, tangent = jvp(lambda x: autograd_functions.connect(x, value), (x,), (TANGENT.to(prediction),))
    assert tangent.dtype == real
    assert torch.equal(tangent, TANGENT.to(prediction).to(real))


@CASES
def test_jacobians(run, factor):
    expected = factor * torch.eye(4, dtype=torch.float64)

    def row(x):
        return run(x.expand(3, 4))[0]

    assert torch.equal(jacrev(row)(X[0]), expected)
    assert torch.equal(jacfwd(row)(X[0]), expected)


@CASES
def test_vmap_is_a_loop(run, factor):
    stacked = torch.stack([X, 2 * X, -X])
    assert torch.equal(vmap(run)(stacked), torch.stack([run(x) for x in stacked]))


@CASES
def test_per_sample_gradients_are_those_of_a_loop(run, factor):
    """vmap over grad: the vmap rule of the backward pass."""

    def loss(x):
        return (run(x.expand(3, 4)) ** 2).sum()

    got = vmap(grad(loss))(X)
    for x, g in zip(X, got, strict=True):
        torch.testing.assert_close(g, grad(loss)(x))


@CASES
def test_second_derivatives_carry_the_factor_squared(run, factor):
    """Connect and scale are linear: the second derivative of half their square is factor^2."""

    def loss(x):
        return (run(x.expand(3, 4)) ** 2).sum() / 2

    assert torch.equal(hessian(loss)(X[0]), 3 * factor**2 * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "run", [lambda x: autograd_functions.connect(x, REAL), lambda x: autograd_functions.scale(x, 0.3)]
)
def test_the_backward_pass_is_differentiable(run):
    """The backward pass is itself differentiable."""
    x, c = X.clone().requires_grad_(), TANGENT.clone().requires_grad_()
    (g,) = torch.autograd.grad(run(x), x, c, create_graph=True)
    (gc,) = torch.autograd.grad(g, c, torch.ones_like(g))
    assert gc.abs().min() > 0


@pytest.mark.parametrize("way", ["backward", "jvp"])
def test_a_prediction_may_have_another_dtype_than_the_latent(way):
    """A float32 prediction of a bfloat16 latent."""
    real = REAL.to(torch.bfloat16)
    if way == "backward":
        x = X.float().requires_grad_()
        out = autograd_functions.connect(x, real)
        assert out.dtype == torch.bfloat16
        (g,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert g.dtype == torch.float32
    else:
        out, pushed = jvp(lambda x: autograd_functions.connect(x, real), (X.float(),), (TANGENT.float(),))
        assert out.dtype == pushed.dtype == torch.bfloat16


def test_connect_and_scale_pass_gradient_under_no_grad():
    """A pipeline's __call__ runs under no_grad; gradients pass through connect and scale nevertheless."""
    x = X.clone().requires_grad_()
    with torch.no_grad():
        out = autograd_functions.connect(autograd_functions.scale(x, 0.5), REAL)
    assert torch.equal(torch.autograd.grad(out, x, TANGENT)[0], 0.5 * TANGENT)


def test_the_rollout_s_value_gets_no_gradient():
    real = REAL.clone().requires_grad_()
    out = autograd_functions.connect(X.clone().requires_grad_(), real)
    out.sum().backward()
    assert real.grad is None
