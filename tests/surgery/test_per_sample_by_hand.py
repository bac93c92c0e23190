"""Plans for each sample, and the ways of a call, against values worked out by hand on v = w x."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.builders.linear_field import SIGMAS, X3, Counted, W, rolled
from trajsurgery import (
    PerSample,
    Plan,
    PlanError,
    SamplerError,
    apply,
    distances,
    latent,
    leapalign,
    noise,
    refl,
    rollout,
    sample,
)
from trajsurgery.surgery import autograd_functions
from trajsurgery.surgery.autograd_functions import Gate

TWO = torch.tensor([[2.0, -4.0], [1.0, 3.0]], dtype=torch.float64)


class Timed(Counted):
    """Notes the shape of each call's sigma."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.shapes.append(tuple(sigma.shape))
        return self.w * x


def gradients(plan: PerSample, start: Tensor, memory: Any = "retain") -> tuple[list[float], list[tuple[int, ...]]]:
    """d(sum of each sample's output)/dw, and the shapes of sigma in the calls with gradient."""
    field = Timed()
    trajectory = rollout(field, start, SIGMAS)
    field.shapes.clear()
    out: Any = apply(plan, trajectory, field, memory)
    found = [float(torch.autograd.grad(row.sum(), field.w, retain_graph=True)[0]) for row in out]
    return found, field.shapes


@pytest.mark.parametrize("memory", ["retain", "recompute"])
@pytest.mark.parametrize("ts, shape", [((2, 2), ()), ((2, 1), (2,)), ((1, 3), (2,))])
def test_samples_at_one_time_share_a_sigma_and_others_have_their_own(
    memory: str, ts: tuple[int, int], shape: tuple[int, ...]
) -> None:
    found, shapes = gradients(PerSample([refl(t) for t in ts]), TWO, memory)
    trajectory = rollout(Counted(), TWO, SIGMAS)
    expected = [-trajectory.number(t) * float(trajectory[t][i].sum()) for i, t in enumerate(ts)]
    assert found == pytest.approx(expected, abs=1e-14)
    assert set(shapes) == {shape}


def test_a_batch_of_one_is_its_plan() -> None:
    found, shapes = gradients(PerSample([refl(2)]), X3)
    assert found == pytest.approx([-0.75 * float(rolled()[2].sum())])
    assert shapes == [()]


def test_a_large_batch_has_as_many_plans() -> None:
    found, _ = gradients(PerSample([refl(1)] * 300), X3.repeat(300, 1))
    assert len(set(found)) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_there_are_as_many_plans_as_samples(count: int) -> None:
    with pytest.raises(PlanError, match=f"PerSample holds {count} plans for a batch of 2"):
        gradients(PerSample([refl(1)] * count), TWO)


def test_the_distance_of_a_time_is_the_mean_of_the_predictions_there() -> None:
    """Two leaps land on t = 1 from 3 and from 2; the second is the sampler's step and counts not."""
    three = torch.cat([X3, TWO])
    field = Counted()
    trajectory = rollout(field, three, SIGMAS)
    x = latent(3)
    far, double = x.leap(1).connect(), x.leap(1, velocity=x.velocity().scale(2.0)).connect()
    plan = Plan(far.leap(0), double.leap(0))
    at_1 = distances(plan, trajectory, field)[1]
    misses = [(trajectory[1] - three * (1 - s * 0.5 * W)).abs().mean(1) for s in (1, 1)]
    assert torch.allclose(at_1, torch.stack(misses).mean(0), atol=1e-14)
    assert at_1.shape == (3,)


def test_a_gate_stops_whole_rows_of_images() -> None:
    x = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gate = Gate()
    out = autograd_functions.gated(x, gate)
    gate.rows = torch.tensor([1.0, 0.0])
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient[0].eq(1).all()
    assert gradient[1].eq(0).all()


def test_split_is_swept_by_backward_alone() -> None:
    field = Counted()
    word: Any = "".join(["sp", "lit"])  # as read from a file
    out: Any = apply(leapalign(3, 1, 0.25), rolled(), field, word)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(out.sum(), field.w)
    out.sum().backward()
    whole = Counted()
    expected: Any = apply(leapalign(3, 1, 0.25), rolled(), whole, "retain")
    expected.sum().backward()
    assert torch.equal(field.w.grad or torch.zeros(()), whole.w.grad or torch.ones(()))


def test_split_refuses_to_be_asked_for_the_noise_s_gradient_alone() -> None:
    start = X3.clone().requires_grad_()
    out: Any = sample(Plan(noise().leap(1).leap(0)), Counted(), start, SIGMAS, memory="split")[0]
    with pytest.raises(RuntimeError, match="memory='split' adds parameter gradients"):
        torch.autograd.grad(out.sum(), start)


class Linear(nn.Module):
    """v = w x, or v = u x once `other` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = (nn.Parameter(torch.tensor(W, dtype=torch.float64)) for _ in range(2))
        self.other = False

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (self.u if self.other else self.w) * x


def test_a_parameter_that_joins_later_is_seen_where_leaves_are_looked_for() -> None:
    """A closure over a module says nothing of its parameters: they are found by one call."""
    module = Linear()
    field: Any = lambda x, sigma: module(x, sigma)  # noqa: E731
    out: Any = apply(leapalign(3, 1), rolled(field), field, "recompute")
    module.other = True
    with pytest.raises(SamplerError):
        out.sum().backward()
    named: Any = apply(leapalign(3, 1), rolled(field), field, "recompute", params=[module.w, module.u])
    named.sum().backward()
    assert module.u.grad is not None


def test_split_is_refused_under_ddp(tmp_path: Any) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        field = DistributedDataParallel(Linear(), find_unused_parameters=True)
        trajectory = rollout(field, X3, SIGMAS)
        with pytest.raises(SamplerError, match="DistributedDataParallel averages"):
            apply(refl(1), trajectory, field, "".join(["sp", "lit"]))  # pyright: ignore[reportArgumentType]
        apply(refl(1), trajectory, field, "retain")
    finally:
        dist.destroy_process_group()
