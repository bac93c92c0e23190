"""Parameters that train: a module's, the leaves behind a lambda, or those in params=."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tests.builders.problems import cotangents, distance, problem
from tests.tolerances import EXACT
from trajsurgery import Plan, SamplerError, apply, backward, latent, leapalign, noise
from trajsurgery.surgery.parameters import leaves
from trajsurgery.testing import MLP

PLAN = leapalign(6, 3, 0.3)


def weights(seed=0):
    """A field's weights as a dict of tensors, and the field."""
    generator = torch.Generator().manual_seed(seed)
    w = {
        "inner": torch.randn(4, 8, generator=generator, dtype=torch.float64).requires_grad_(),
        "outer": torch.randn(8, 4, generator=generator, dtype=torch.float64).requires_grad_(),
        "time": torch.randn(8, generator=generator, dtype=torch.float64).requires_grad_(),
    }
    return w, lambda x, sigma: torch.tanh(x @ w["inner"] + sigma * w["time"]) @ w["outer"]


def test_a_lambda_over_a_dict_of_tensors_trains_them():
    w, field = weights()
    p = problem(field)
    c = cotangents([p.trajectory[0]])
    expected = torch.autograd.grad(apply(PLAN, p.trajectory, field), list(w.values()), c)
    actual = torch.autograd.grad(apply(PLAN, p.trajectory, field, memory="recompute"), list(w.values()), c)
    assert distance(actual, expected) <= EXACT
    named = apply(PLAN, p.trajectory, field, memory="recompute", params=w)
    assert distance(torch.autograd.grad(named, list(w.values()), c), expected) <= EXACT
    backward(PLAN, p.trajectory, field, c)
    assert distance([leaf.grad for leaf in w.values()], expected) <= EXACT


def test_a_lambda_over_a_module_trains_it(rolled):
    def field(x, sigma):
        return 2 * rolled.field(x, sigma)

    p = problem(field)
    c = cotangents([p.trajectory[0]])
    expected = torch.autograd.grad(apply(PLAN, p.trajectory, field), rolled.params, c)
    actual = torch.autograd.grad(apply(PLAN, p.trajectory, field, "recompute"), rolled.params, c)
    assert distance(actual, expected) <= EXACT


def test_leaves_are_looked_up_once():
    w, inner = weights()
    calls = []

    def field(x, sigma):
        calls.append(1)
        return inner(x, sigma)

    p = problem(field)
    calls.clear()
    for _ in range(3):
        apply(PLAN, p.trajectory, field, "recompute")
    assert len(calls) == 1
    assert {id(leaf) for leaf in leaves(field, p.trajectory[1], p.sigmas[0])} == {id(v) for v in w.values()}


def test_a_field_may_be_one_leaf_and_must_have_one():
    shift = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    p = problem(lambda x, sigma: shift * 1.0)
    assert leaves(lambda x, sigma: shift, p.noise, p.sigmas[0]) == (shift,)
    with pytest.raises(SamplerError, match="requires a gradient"):
        leaves(lambda x, sigma: x, p.noise, p.sigmas[0])


@pytest.mark.parametrize("memory", ["retain", "recompute"])
def test_a_leaf_that_replaced_another_trains_or_is_refused(memory):
    """Leaves are cached: weights that replaced others later got no gradient, without an error."""
    w, field = weights()
    p = problem(field)
    apply(PLAN, p.trajectory, field, memory).sum().backward()
    w["inner"] = w["inner"].detach().clone().requires_grad_()
    try:
        apply(PLAN, p.trajectory, field, memory).sum().backward()
    except (SamplerError, RuntimeError) as err:
        assert "params=" in str(err)  # noqa: PT017
    else:
        assert w["inner"].grad is not None


@pytest.mark.parametrize("memory", ["retain", "recompute"])
def test_a_leaf_unfrozen_later_trains_or_is_refused(memory):
    w, field = weights()
    w["inner"].requires_grad_(False)
    p = problem(field)
    apply(PLAN, p.trajectory, field, memory).sum().backward()
    w["inner"].requires_grad_(True)
    try:
        apply(PLAN, p.trajectory, field, memory).sum().backward()
    except (SamplerError, RuntimeError) as err:
        assert "params=" in str(err)  # noqa: PT017
    else:
        assert w["inner"].grad is not None


def test_params_choose_what_trains(rolled):
    first, *others = rolled.params
    out = apply(PLAN, rolled.trajectory, rolled.field, "recompute", params=iter([first]))
    out.sum().backward()
    assert first.grad.abs().max() > 0
    assert all(p.grad is None for p in others)


@pytest.fixture
def mesh(tmp_path):
    """One process, as a mesh."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_sharded_parameters_are_refused_with_a_hint_to_backward(mesh):
    """An autograd.Function drops the gradients of DTensors without an error."""
    w, _ = weights()
    sharded = {name: distribute_tensor(v.detach(), mesh, [Replicate()]).requires_grad_() for name, v in w.items()}
    assert all(isinstance(v, DTensor) for v in sharded.values())

    def field(x, sigma):
        inner, outer = (sharded[name].full_tensor() for name in ("inner", "outer"))
        return torch.tanh(x @ inner) @ outer

    p = problem(field)
    with pytest.raises(SamplerError, match=r"trajsurgery\.backward"):
        apply(PLAN, p.trajectory, field, "recompute")
    backward(PLAN, p.trajectory, field, torch.ones_like(p.trajectory[0]))
    assert sharded["inner"].grad.full_tensor().abs().max() > 0


def test_whatever_has_a_device_mesh_is_sharded(rolled):
    rolled.params[0].device_mesh = "a mesh"
    with pytest.raises(SamplerError, match=r"trajsurgery\.backward"):
        apply(PLAN, rolled.trajectory, rolled.field, "recompute")


def test_all_fields_of_a_mapping_train():
    a, b = MLP(4, seed=1), MLP(4, seed=2)
    p = problem(a)
    plan = Plan(latent(5).leap(3).connect().leap(0, velocity=latent(3).velocity("b")))
    c = cotangents([p.trajectory[0]])
    both = [*a.parameters(), *b.parameters()]
    expected = torch.autograd.grad(apply(plan, p.trajectory, {None: a, "b": b}), both, c)
    actual = torch.autograd.grad(apply(plan, p.trajectory, {None: a, "b": b}, "recompute"), both, c)
    assert distance(actual, expected) <= EXACT
    assert all(g.abs().max() > 0 for g in actual)


@pytest.mark.parametrize("memory", ["retain", "recompute", "split"])
def test_a_field_unfrozen_after_its_first_run_trains(memory):
    """Fields that are plain functions: the leaves of a frozen one were cached as none, and its gradient was lost."""
    a, b = MLP(4, seed=1), MLP(4, seed=2)
    fields = {None: lambda x, sigma: a(x, sigma), "b": lambda x, sigma: b(x, sigma)}
    p = problem(a)
    plan = Plan(latent(5).advance(0, [latent(5).velocity(), latent(3).velocity("b")]))
    a.requires_grad_(False)
    apply(plan, p.trajectory, fields, memory)
    a.requires_grad_(True)
    apply(plan, p.trajectory, fields, memory).sum().backward()
    expected = torch.autograd.grad(apply(plan, p.trajectory, fields).sum(), list(a.parameters()))
    assert distance([w.grad for w in a.parameters()], expected) <= EXACT


def test_no_params_leave_the_gradient_to_the_noise(rolled):
    """A call that nothing is asked of has no backward pass of its own."""
    plan = Plan(noise().leap(0), latent(3).leap(0))
    c = torch.ones_like(rolled.noise)
    backward(plan, rolled.trajectory, rolled.field, [c, c], params=[])
    (expected,) = torch.autograd.grad(apply(plan, rolled.trajectory, rolled.field)[0].sum(), rolled.noise)
    assert distance([rolled.noise.grad], [expected]) <= EXACT
    assert all(w.grad is None for w in rolled.params)
