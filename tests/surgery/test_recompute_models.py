"""Recompute on real transformers and under what users add to them: checkpointing, autocast, LoRA, torch.compile."""

import functools
import itertools
import shutil
import weakref

import pytest
import torch
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from tests.builders.problems import distance, problem
from tests.builders.small_transformers import FluxField, SD3Field
from tests.tolerances import EXACT, VALUE
from trajsurgery import Plan, SamplerError, apply, backward, drtune, latent, leapalign, rollout, sample
from trajsurgery.testing import MLP

FIELDS = {"flux": FluxField, "sd3": SD3Field}
DRTUNE = drtune(8, 2, {7, 3})


def full(steps):
    """Every step of the sampler, differentiated."""
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.leap(t - 1)
    return Plan(x)


def saved_bytes(run, parameters):
    """Bytes of the storages that autograd saved in `run` and holds at its end, parameters excluded; and the result."""
    parameter_storages, held = {p.untyped_storage()._cdata for p in parameters}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameter_storages and storage._cdata not in held:
            held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, held.pop, storage._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(held.values()), result


def trained(field):
    return [p for p in field.parameters() if p.requires_grad]


def gradients(field, run):
    """What `run` adds to `.grad` of all that trains; no gradient is None."""
    field.zero_grad()
    run()
    assert all(p.grad is not None for p in trained(field))
    assert all(p.grad is None for p in field.parameters() if not p.requires_grad)
    return [p.grad for p in trained(field)]


def all_ways(field, plan, p):
    """{way: gradient}, of the sum of the output."""
    return {
        "retain": gradients(field, lambda: apply(plan, p.trajectory, field).sum().backward()),
        "recompute": gradients(field, lambda: apply(plan, p.trajectory, field, "recompute").sum().backward()),
        "split": gradients(field, lambda: apply(plan, p.trajectory, field, "split").sum().backward()),
        "staged": gradients(field, lambda: backward(plan, p.trajectory, field, torch.ones_like(p.trajectory[0]))),
    }


def agree(field, plan, p, tolerance=EXACT):
    by_way = all_ways(field, plan, p)
    assert torch.stack([g.norm() for g in by_way["retain"]]).norm() > 0
    for way in ("recompute", "split", "staged"):
        assert distance(by_way[way], by_way["retain"]) <= tolerance, way
    return by_way["recompute"]


def loop(field, noise, sigmas):
    """The sampler's loop, with gradient."""
    x = noise.detach()
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * field(x, now)
    return x


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", FIELDS)
def test_25_steps_save_less_than_one_retained_step(name, mode):
    field = getattr(FIELDS[name](), mode)()
    sigmas, noise = torch.linspace(1, 0, 26, dtype=torch.float64), torch.randn(2, *field.shape, dtype=torch.float64)
    trajectory, parameters = rollout(field, noise, sigmas), list(field.parameters())
    one, _ = saved_bytes(lambda: apply(Plan(latent(1).leap(0)), trajectory, field), parameters)
    many, out = saved_bytes(lambda: apply(full(25), trajectory, field, "recompute"), parameters)
    sampled, _ = saved_bytes(lambda: sample(full(25), field, noise, sigmas, memory="recompute"), parameters)
    assert many == sampled <= one
    assert saved_bytes(lambda: apply(full(25), trajectory, field), parameters)[0] > 20 * one
    expected = torch.autograd.grad(loop(field, noise, sigmas).sum(), parameters)
    assert distance(torch.autograd.grad(out.sum(), parameters), expected) <= EXACT
    field.model.enable_gradient_checkpointing()
    assert saved_bytes(lambda: apply(full(25), trajectory, field, "recompute"), parameters)[0] == many


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("plan", [leapalign(6, 3, 0.3), DRTUNE], ids=["leapalign", "drtune"])
@pytest.mark.parametrize("name", FIELDS)
def test_all_ways_agree_under_the_model_s_checkpointing(name, plan, mode):
    """DRTune's calls have detached inputs; a reentrant checkpoint would give them None."""
    field = getattr(FIELDS[name](), mode)()
    p = problem(field, shape=(2, *field.shape))
    expected = agree(field, plan, p)
    field.model.enable_gradient_checkpointing()
    assert distance(agree(field, plan, p), expected) <= EXACT


def adapted(start="gaussian"):
    """Flux with LoRA on its attention; B is random too, unless `start` is True, peft's default."""
    field = FluxField()
    field.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    field.model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=start))
    field.to(torch.float64)
    for name, p in field.named_parameters():
        if "lora_B" in name and start == "gaussian":
            torch.nn.init.normal_(p)
    return field


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", [leapalign(6, 3, 0.3), DRTUNE, full(8)], ids=["leapalign", "drtune", "full"])
def test_all_ways_agree_with_lora(plan, checkpointing):
    field = adapted()
    if checkpointing:
        field.model.enable_gradient_checkpointing()
    p = problem(field, shape=(2, *field.shape))
    actual = agree(field, plan, p)
    assert len(actual) == 2 * 7
    if plan == full(8):
        expected = torch.autograd.grad(loop(field, p.noise, p.sigmas).sum(), trained(field))
        assert distance(actual, expected) <= EXACT


@pytest.fixture
def reentrant():
    """LoRA under the checkpoint that gives None to the parameters of a call whose input needs no gradient."""
    field = adapted()
    p = problem(field, shape=(2, *field.shape))
    old = functools.partial(checkpoint, use_reentrant=True)
    field.model.enable_gradient_checkpointing(gradient_checkpointing_func=old)
    return field, p


@pytest.mark.parametrize("plan", [leapalign(6, 3, 0.3), DRTUNE], ids=["leapalign", "drtune"])
@pytest.mark.parametrize("memory", ["retain", "recompute", "staged", "recompute behind a lambda"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_is_refused(memory, plan, reentrant):
    field, p = reentrant
    ones = torch.ones_like(p.trajectory[0])
    run = {
        "retain": lambda: apply(plan, p.trajectory, field),
        "recompute": lambda: apply(plan, p.trajectory, field, "recompute").sum().backward(),
        "staged": lambda: backward(plan, p.trajectory, field, ones),
        "recompute behind a lambda": lambda: (
            apply(plan, p.trajectory, lambda x, sigma: field(x, sigma), "recompute", params=trained(field))
            .sum()
            .backward()
        ),
    }[memory]
    with pytest.raises((SamplerError, RuntimeError), match="use_reentrant=False"):
        run()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # RMSNorm under autocast is not fused on a CPU
def test_recompute_agrees_with_retain_under_autocast(cache, inside):
    """With the cache of casts two retained calls add up in bfloat16, recomputed ones in float32."""
    field = FluxField().float()
    noise, sigmas = torch.randn(2, *field.shape), torch.linspace(1, 0, 9)
    plan, by_memory = leapalign(6, 3, 0.3), {}
    for memory in ("retain", "recompute"):
        field.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            out, _ = sample(plan, lambda x, s: field(x, s).to(x.dtype), noise, sigmas, memory=memory)
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        by_memory[memory] = [p.grad for p in field.parameters()]
        assert all(g is not None and g.dtype == torch.float32 for g in by_memory[memory])
    tolerance = VALUE[torch.bfloat16 if cache else torch.float32]
    assert distance(by_memory["recompute"], by_memory["retain"]) <= tolerance
    plain = torch.autograd.grad(sample(plan, field, noise, sigmas)[0].sum(), list(field.parameters()))
    assert distance(by_memory["recompute"], plain) > VALUE[torch.float32]  # autocast did compute in bfloat16


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged"])
def test_a_frozen_field_passes_the_gradient_on(memory):
    """The frozen field passes the gradient on, and may also be called on a constant."""
    field, frozen = MLP(4, seed=1), MLP(4, seed=2).requires_grad_(False)
    p = problem(field)
    x_5 = latent(7).leap(5)
    x_3 = x_5.leap(3, velocity=x_5.velocity("frozen"))
    plan = Plan(x_3.leap(1, velocity=latent(3).velocity("frozen")).leap(0))
    fields, x, sigma = {None: field, "frozen": frozen}, p.trajectory, p.trajectory.sigma
    y_5 = x[7] + (sigma(5) - sigma(7)) * field(x[7], sigma(7))
    y_3 = y_5 + (sigma(3) - sigma(5)) * frozen(y_5, sigma(5))
    y_1 = y_3 + (sigma(1) - sigma(3)) * frozen(x[3], sigma(3))
    y_0 = y_1 - sigma(1) * field(y_1, sigma(1))
    expected = torch.autograd.grad(y_0.sum(), p.params)
    if memory == "staged":
        backward(plan, x, fields, torch.ones_like(p.noise))
    else:
        apply(plan, x, fields, memory).sum().backward()
    assert distance([q.grad for q in field.parameters()], expected) <= EXACT
    assert all(q.grad is None for q in frozen.parameters())


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged"])
def test_two_frozen_fields_are_refused(memory):
    field, frozen = MLP(4, seed=1).requires_grad_(False), MLP(4, seed=2).requires_grad_(False)
    p = problem(field)
    plan, fields = Plan(latent(5).leap(2, velocity=latent(5).velocity("b")).leap(0)), {None: field, "b": frozen}
    with pytest.raises(SamplerError, match=r"requires_grad_\(\)"):
        backward(plan, p.trajectory, fields, torch.ones_like(p.noise)) if memory == "staged" else apply(
            plan, p.trajectory, fields, memory
        )


class Backend:
    """A backend of torch.compile that counts what it compiles."""

    def __init__(self, name):
        self.name, self.count = name, 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)


DYNAMO_LOOKS_AT_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
"""Dynamo reads `.grad` of every input, leaf or not."""


@pytest.fixture
def fresh():
    """torch.compile without what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("wrap", ["module", "lambda", "in place"])
@pytest.mark.parametrize("plan", [DRTUNE, full(8)], ids=["drtune", "full"])
@DYNAMO_LOOKS_AT_GRAD
def test_a_compiled_field_has_the_same_gradient_and_compiles_once(plan, wrap, backend, fresh):
    field, plain, counted = MLP(4, seed=3), MLP(4, seed=3), Backend(backend)
    if wrap == "in place":
        field.compile(backend=counted)
        compiled = field
    else:
        inner = field if wrap == "module" else lambda x, sigma: field(x, sigma)
        compiled = torch.compile(inner, backend=counted)
    p = problem(plain)
    expected = torch.autograd.grad(apply(plan, p.trajectory, plain).sum(), p.params)
    for memory in ("retain", "recompute"):
        out = apply(plan, p.trajectory, compiled, memory)
        assert distance(torch.autograd.grad(out.sum(), list(field.parameters())), expected) <= EXACT
    done = counted.count
    assert done > 0
    apply(plan, p.trajectory, compiled, "recompute").sum().backward()
    assert counted.count == done, "each iteration compiles anew"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs a C++ compiler on a CPU")
@DYNAMO_LOOKS_AT_GRAD
def test_a_field_compiled_by_the_default_backend_has_the_same_gradient(fresh):
    field, plain = MLP(4, seed=3), MLP(4, seed=3)
    p = problem(plain)
    plan = leapalign(6, 3, 0.3)
    expected = torch.autograd.grad(apply(plan, p.trajectory, plain).sum(), p.params)
    out = apply(plan, p.trajectory, torch.compile(field), "recompute")
    assert distance(torch.autograd.grad(out.sum(), list(field.parameters())), expected) <= EXACT


@pytest.mark.slow
@DYNAMO_LOOKS_AT_GRAD
def test_a_compiled_flux_has_the_same_gradient(fresh):
    field = FluxField()
    p = problem(field, shape=(2, *field.shape))
    expected = torch.autograd.grad(apply(DRTUNE, p.trajectory, field).sum(), p.params)
    out = apply(DRTUNE, p.trajectory, torch.compile(field, backend="eager"), "recompute")
    assert distance(torch.autograd.grad(out.sum(), p.params), expected) <= EXACT
