"""Parameters without a gradient: a run names them once, and unreached ones get None in every memory mode."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.builders import toy_world
from tests.builders.problems import distance, problem
from tests.builders.small_transformers import SD3Field
from tests.surgery.test_recompute_models import adapted
from trajsurgery import RecipeError, ReFL, apply, backward, leapalign
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache
from trajsurgery.training.faults import missing_gradients
from trajsurgery.training.settings import Optimiser
from trajsurgery.training.training_loop import train, training_step

PLAN = leapalign(6, 3, 0.3)
IDLE_IN_SD3 = {
    f"model.transformer_blocks.1.attn.{n}" for n in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
}
"""The last block discards its text output, so its text queries get no gradient."""


def test_none_and_zero_are_no_gradient_and_nan_is_one():
    named = {name: torch.zeros(2, requires_grad=True) for name in ("none", "zeros", "nan", "one", "frozen")}
    assert missing_gradients.without_gradient(named.items()) == [*named]
    named["frozen"].requires_grad_(False)
    for name, value in (("zeros", 0.0), ("nan", torch.nan), ("one", 1.0)):
        named[name].grad = torch.tensor([0.0, value])
    assert missing_gradients.without_gradient(named.items()) == ["none", "zeros"]


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged"])
def test_the_idle_parameters_of_sd3_are_named(memory):
    field = SD3Field()
    p = problem(field, shape=(2, *field.shape))
    if memory == "staged":
        backward(PLAN, p.trajectory, field, torch.ones_like(p.trajectory[0]))
    else:
        apply(PLAN, p.trajectory, field, memory).sum().backward()
    names = missing_gradients.without_gradient(field.named_parameters())
    assert set(names) == IDLE_IN_SD3
    assert all(name in missing_gradients.warning(names, 99) for name in names)


def test_lora_a_matrices_have_no_gradient_in_the_first_iteration():
    field = adapted(start=True)
    p = problem(field, shape=(2, *field.shape))
    apply(PLAN, p.trajectory, field, "recompute").sum().backward()
    names = missing_gradients.without_gradient(field.named_parameters())
    assert len(names) == 7
    assert all("lora_A" in name for name in names)
    assert "7 A matrices of LoRA: right in the first iteration" in missing_gradients.warning(names, 14)


def test_long_lists_are_shortened_and_lora_is_listed_apart():
    warning = missing_gradients.warning([*(f"block.{i}" for i in range(20)), "to_q.lora_A.default.weight"], 50)
    assert warning.startswith("21 of 50 parameters that train got no gradient")
    assert "block.7 and 12 more" in warning
    assert "block.8" not in warning
    assert "Also 1 A matrices of LoRA" in warning


def with_unused_parameter(world):
    """Add a trainable parameter that nothing depends on."""
    world.module.register_parameter("asleep", torch.nn.Parameter(torch.ones(3)))
    return world


@pytest.mark.parametrize("memory", ["retain", "staged", "split"])
def test_a_run_checks_once_and_logs_idle_parameters(tmp_path, monkeypatch, memory):
    recipe = toy_world.recipe(tmp_path, iterations=3)
    recipe = replace(recipe, rollout=replace(recipe.rollout, memory=memory))
    world, records, checks = with_unused_parameter(toy_world.world(recipe)), [], []
    without_gradient = missing_gradients.without_gradient
    monkeypatch.setattr(
        missing_gradients, "without_gradient", lambda named: checks.append(1) or without_gradient(named)
    )
    training = TrainingState.start(recipe, world.module)
    assert train(recipe, world, training, records.append)
    assert [record.idle for record in records] == [("asleep",), None, None]
    assert len(checks) == 1
    assert torch.equal(world.module.asleep, torch.ones(3)), "weight decay changed a parameter without a gradient"
    other = TrainingState.start(recipe, world.module)
    other.set_counters(training.counters())
    assert other.looked


def test_a_closed_hinge_postpones_the_check_to_the_next_iteration(tmp_path):
    recipe = toy_world.recipe(tmp_path)
    world = with_unused_parameter(toy_world.world(recipe))
    training, embeddings = TrainingState.start(recipe, world.module), PromptCache(world.pipe, world.texts)
    assert training_step(recipe, world, embeddings, training, -5.0).idle is None
    assert training_step(recipe, world, embeddings, training, 0.9).idle == ("asleep",)
    assert training_step(recipe, world, embeddings, training, 0.9).idle is None


def test_zeros_everywhere_are_an_error(tmp_path):
    """A reward whose gradient is zero: every parameter gets a gradient, and nothing would ever change."""
    recipe = toy_world.recipe(tmp_path)
    world = replace(toy_world.world(recipe), reward=lambda images, prompts: (images * 0).mean((1, 2, 3)))
    training = TrainingState.start(recipe, world.module)
    with pytest.raises(RecipeError, match="no parameter of the transformer received a gradient"):
        training_step(recipe, world, PromptCache(world.pipe, world.texts), training, 0.9)


class UsesParameterEarly(torch.nn.Module):
    """A field with a parameter that it uses at high noise only."""

    def __init__(self):
        super().__init__()
        self.always = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64))
        self.early = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))

    def forward(self, x, sigma):
        return torch.tanh(x * self.always) + (self.early * x.sin() if sigma > 0.6 else 0)


def three_steps(staged, cleared=True):
    """Three steps of AdamW with decay along plans of which only the first calls the field at high noise."""
    field = UsesParameterEarly()
    optimiser = torch.optim.AdamW(field.parameters(), lr=0.1, weight_decay=0.5)
    for plan in (leapalign(8, 3), leapalign(3, 1), leapalign(2, 1)):
        p = problem(field)
        if staged and cleared:
            with missing_gradients.clear_untouched_gradients(list(field.parameters())):
                backward(plan, p.trajectory, field, torch.ones_like(p.noise))
        elif staged:
            backward(plan, p.trajectory, field, torch.ones_like(p.noise))
        else:
            apply(plan, p.trajectory, field).sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=not staged)
    return list(field.parameters())


def test_weight_decay_changes_the_same_parameters_in_all_memory_modes():
    expected = three_steps(staged=False)
    assert distance(three_steps(staged=True), expected) <= 1e-12
    assert distance(three_steps(staged=True, cleared=False), expected) > 1e-3  # weight decay applies to zero gradients


@pytest.mark.parametrize("memory", ["recompute", "staged"])
def test_memory_modes_agree_where_some_iterations_do_not_reach_a_parameter(tmp_path, memory):
    weights = {}
    for mode in ("retain", memory):
        recipe = toy_world.recipe(
            tmp_path, ReFL(last=3), optimiser=Optimiser(rate=1e-3, weight_decay=10.0), iterations=4
        )
        recipe = replace(recipe, rollout=replace(recipe.rollout, memory=mode))
        world, reached = toy_world.world(recipe), []
        world.module.register_parameter("early", torch.nn.Parameter(torch.full((16,), 0.3)))

        def hook(module, args, kwargs, output, reached=reached):
            high = bool((kwargs["timestep"] > 0.3).all())
            if torch.is_grad_enabled():
                reached.append(high)
            return (output[0] + module.early * kwargs["hidden_states"],) if high else output

        world.module.register_forward_hook(hook, with_kwargs=True)
        training = TrainingState.start(recipe, world.module)
        assert train(recipe, world, training, lambda record: None)
        assert True in reached
        weights[mode] = [p.detach().clone() for p in training.parameters]
        steps = training.optimiser.state[world.module.early]["step"]
        assert steps < 4, "every iteration reached the parameter, so this test checks nothing"
    assert distance(weights[memory], weights["retain"]) < 1e-5


class Ops(TorchDispatchMode):
    """Counts operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_clearing_untouched_gradients_runs_no_tensor_operations():
    parameters = [torch.ones(2, requires_grad=True) for _ in range(3)]
    for p in parameters[:2]:
        p.grad = torch.zeros(2)
    loss = parameters[0].sum()
    with (
        Ops() as ops,
        missing_gradients.clear_untouched_gradients(parameters),
        torch.utils._python_dispatch._disable_current_modes(),
    ):
        loss.backward()
    assert ops.count == 0
    assert [p.grad is None for p in parameters] == [False, True, True]
