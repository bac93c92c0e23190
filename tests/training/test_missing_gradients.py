"""The gradient alarm: what got no gradient is named, once; what was not reached is None in every way of running."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.builders import toy_world
from tests.builders.problems import distance, problem
from tests.builders.small_transformers import SD3Field
from tests.surgery.test_recompute_models import adapted
from trajsurgery import RecipeError, ReFL, apply, backward, leapalign
from trajsurgery.training import missing_gradients
from trajsurgery.training.checkpoint import TrainingState
from trajsurgery.training.components import PromptCache
from trajsurgery.training.settings import Optimiser
from trajsurgery.training.training_loop import train, training_step

PLAN = leapalign(6, 3, 0.3)
IDLE_IN_SD3 = {
    f"model.transformer_blocks.1.attn.{n}" for n in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
}
"""Its last block discards its text."""


def test_none_and_zeros_are_idle_and_nan_is_not():
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


def test_lora_that_starts_at_zero():
    field = adapted(start=True)
    p = problem(field, shape=(2, *field.shape))
    apply(PLAN, p.trajectory, field, "recompute").sum().backward()
    names = missing_gradients.without_gradient(field.named_parameters())
    assert len(names) == 7
    assert all("lora_A" in name for name in names)
    assert "7 A matrices of LoRA: right in the first iteration" in missing_gradients.warning(names, 14)


def test_long_lists_are_cut_and_lora_is_told_apart():
    said = missing_gradients.warning([*(f"block.{i}" for i in range(20)), "to_q.lora_A.default.weight"], 50)
    assert said.startswith("21 of 50 parameters that train got no gradient")
    assert "block.7 and 12 more" in said
    assert "block.8" not in said
    assert "Also 1 A matrices of LoRA" in said


def asleep(world):
    """A parameter that trains and that nothing depends on."""
    world.module.register_parameter("asleep", torch.nn.Parameter(torch.ones(3)))
    return world


@pytest.mark.parametrize("memory", ["retain", "staged", "split"])
def test_a_run_looks_once_and_logs_what_is_idle(tmp_path, monkeypatch, memory):
    recipe = toy_world.recipe(tmp_path, iterations=3)
    recipe = replace(recipe, rollout=replace(recipe.rollout, memory=memory))
    world, seen, looks = asleep(toy_world.world(recipe)), [], []
    found = missing_gradients.without_gradient
    monkeypatch.setattr(missing_gradients, "without_gradient", lambda named: looks.append(1) or found(named))
    training = TrainingState.start(recipe, world.module)
    assert train(recipe, world, training, seen.append)
    assert [record.idle for record in seen] == [("asleep",), None, None]
    assert len(looks) == 1
    assert torch.equal(world.module.asleep, torch.ones(3)), "weight decay moved what no gradient reaches"
    other = TrainingState.start(recipe, world.module)
    other.restore(training.state())
    assert other.looked


def test_a_closed_hinge_says_nothing_and_the_next_iteration_is_looked_at(tmp_path):
    recipe = toy_world.recipe(tmp_path)
    world = asleep(toy_world.world(recipe))
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


class Early(torch.nn.Module):
    """A field one of whose parameters counts at high noise only."""

    def __init__(self):
        super().__init__()
        self.always = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64))
        self.early = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))

    def forward(self, x, sigma):
        return torch.tanh(x * self.always) + (self.early * x.sin() if sigma > 0.6 else 0)


def stepped(staged, noned=True):
    """Three steps of AdamW with decay along plans of which only the first calls the field at high noise."""
    field = Early()
    optimiser = torch.optim.AdamW(field.parameters(), lr=0.1, weight_decay=0.5)
    for plan in (leapalign(8, 3), leapalign(3, 1), leapalign(2, 1)):
        p = problem(field)
        if staged and noned:
            with missing_gradients.clear_untouched_gradients(list(field.parameters())):
                backward(plan, p.trajectory, field, torch.ones_like(p.noise))
        elif staged:
            backward(plan, p.trajectory, field, torch.ones_like(p.noise))
        else:
            apply(plan, p.trajectory, field).sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=not staged)
    return list(field.parameters())


def test_decay_touches_the_same_parameters_in_every_way():
    wanted = stepped(staged=False)
    assert distance(stepped(staged=True), wanted) <= 1e-12
    assert distance(stepped(staged=True, noned=False), wanted) > 1e-3  # zeros are decayed


@pytest.mark.parametrize("memory", ["recompute", "staged"])
def test_a_run_with_a_parameter_that_some_iterations_do_not_reach(tmp_path, memory):
    found = {}
    for way in ("retain", memory):
        recipe = toy_world.recipe(
            tmp_path, ReFL(last=3), optimiser=Optimiser(rate=1e-3, weight_decay=10.0), iterations=4
        )
        recipe = replace(recipe, rollout=replace(recipe.rollout, memory=way))
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
        found[way] = [p.detach().clone() for p in training.parameters]
        steps = training.optimiser.state[world.module.early]["step"]
        assert steps < 4, "every iteration reached it: this test shows nothing"
    assert distance(found[memory], found["retain"]) < 1e-5


class Ops(TorchDispatchMode):
    """Counts the operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_looking_for_what_was_not_touched_is_no_work_for_the_device():
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
