"""Values of connect, scale and recompute are copies, bit for bit, in every dtype; the textbook formula's are not."""

import pytest
import torch

from tests.tolerances import VALUE
from trajsurgery.surgery import autograd_functions

DTYPES = tuple(VALUE)


def far_apart(dtype):
    """A rollout's latent, and a prediction that misses it by the size of the latents."""
    generator = torch.Generator().manual_seed(0)
    real, prediction = (torch.randn(64, 33, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return real, (3 * prediction).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_connect_is_the_rollout_s_value(dtype):
    real, prediction = far_apart(dtype)
    out = autograd_functions.connect(prediction, real)
    assert out.dtype == dtype
    assert torch.equal(out, real)
    assert out.data_ptr() != real.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_textbook_connector_rounds(dtype):
    """Shows that the test above can fail."""
    real, prediction = far_apart(dtype)
    assert not torch.equal(prediction + (real - prediction).detach(), real)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_keeps_the_value(dtype, factor):
    _, x = far_apart(dtype)
    assert torch.equal(autograd_functions.scale(x, factor), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_textbook_discount_rounds(dtype):
    _, x = far_apart(dtype)
    assert not torch.equal(0.3 * x + (1 - 0.3) * x.detach(), x)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute_is_the_call_s_value(dtype, recorded):
    _, x = far_apart(dtype)
    w = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    value = (w * x).detach()
    out = autograd_functions.recompute(lambda x: w * x, x, (w,), value if recorded else None)
    assert torch.equal(out, value)
    assert out.data_ptr() != value.data_ptr()


@pytest.mark.parametrize("run", [autograd_functions.connect, lambda p, r: autograd_functions.scale(p, 0.5)])
def test_changing_the_result_in_place_does_not_change_the_inputs(run):
    real, prediction = far_apart(torch.float64)
    before = real.clone(), prediction.detach().clone()
    run(prediction, real).detach().add_(1)
    assert torch.equal(real, before[0])
    assert torch.equal(prediction, before[1])
