"""The anchor's gradient against its formula in float64, and on pipelines: all weights, adapters, every memory mode."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from tests.builders import toy_world
from tests.builders.problems import distance
from tests.tolerances import GRADIENT, VALUE
from tests.training.test_several_plans import FixedPlans
from trajsurgery import LeapAlign, Trajectory, leapalign, rollout
from trajsurgery.testing import MLP
from trajsurgery.training.anchor import Anchor, swapped
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.components import PromptCache
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Guards, Optimiser, Rollout, Trained
from trajsurgery.training.training_loop import training_step


def add_noise(parameters: Any, by: float, seed: int = 0) -> None:
    """Stand in for training: add Gaussian noise to the parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.fixture
def case() -> tuple[MLP, dict[str, Tensor], Anchor, Trajectory]:
    """A field with changed weights, its weights before, an anchor with c = 0.7, and a rollout of the changed field."""
    field = MLP(4, seed=3)
    before = {name: p.detach().clone() for name, p in field.named_parameters()}
    anchor = Anchor(field, 0.7, seed=5)
    add_noise(field.parameters(), 0.1)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return field, before, anchor, rollout(field, noise, torch.linspace(1, 0, 9, dtype=torch.float64))


def gradient_by_formula(field: MLP, before: dict[str, Tensor], x: Tensor, sigma: Tensor, c: float) -> dict[str, Tensor]:
    """2 c / n * (dv/dtheta)^T (v - v_base)."""
    current = {name: p.detach() for name, p in field.named_parameters()}
    v, back = vjp(lambda theta: functional_call(field, theta, (x, sigma)), current)
    base = functional_call(field, before, (x, sigma))
    return back(2 * c / v.numel() * (v - base))[0]


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_the_gradient_is_the_formula(case: Any, iteration: int) -> None:
    field, before, anchor, trajectory = case
    t = anchor.time(iteration, trajectory.steps)
    x, sigma = trajectory[t], trajectory.sigma(t)
    expected = gradient_by_formula(field, before, x, sigma, 0.7)
    previous = [torch.full_like(p, 0.25) for p in field.parameters()]
    for p, grad in zip(field.parameters(), previous):
        p.grad = grad.clone()
    mean_square = anchor.add_gradient(field, trajectory, iteration, share=0.5)
    added = [p.grad - grad for p, grad in zip(field.parameters(), previous)]
    assert distance(added, [0.5 * expected[name] for name, _ in field.named_parameters()]) < GRADIENT
    difference = field(x, sigma) - functional_call(field, before, (x, sigma))
    torch.testing.assert_close(mean_square, difference.detach().square().mean(), rtol=VALUE[torch.float64], atol=0)


def test_the_gradient_is_the_numerical_derivative(case: Any) -> None:
    """c * mean |v - v_base|^2 at a fixed x_t, by central differences in a random direction of all weights."""
    field, before, anchor, trajectory = case
    t = anchor.time(1, trajectory.steps)
    anchor.add_gradient(field, trajectory, 1)
    direction = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(9), dtype=p.dtype) for p in field.parameters()
    ]

    @torch.no_grad()
    def value(step: float) -> float:
        theta = {n: p + step * w for (n, p), w in zip(field.named_parameters(), direction)}
        x, sigma = trajectory[t], trajectory.sigma(t)
        v, base = (functional_call(field, weights, (x, sigma)) for weights in (theta, before))
        return 0.7 * float((v - base).square().mean())

    slope = sum(float((p.grad * w).sum()) for p, w in zip(field.parameters(), direction))
    h = 1e-4
    numerical = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert slope == pytest.approx(numerical, rel=1e-9)


def test_weights_and_base_weights_are_restored_even_after_an_error(case: Any) -> None:
    field, before, anchor, trajectory = case
    current = [p.detach().clone() for p in field.parameters()]

    def failing(x: Tensor, sigma: Tensor) -> Tensor:
        raise RuntimeError("no field")

    with pytest.raises(RuntimeError, match="no field"):
        anchor.add_gradient(failing, trajectory, 1)
    anchor.add_gradient(field, trajectory, 1)
    assert all(map(torch.equal, field.parameters(), current))
    assert all(map(torch.equal, anchor.base, before.values()))
    with swapped(field, anchor.base):
        assert all(map(torch.equal, field.parameters(), before.values()))


def test_times_are_uniform_and_follow_from_seed_and_iteration() -> None:
    anchor = Anchor(nn.Module(), 1.0, seed=2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    counts = Counter(anchor.time(i, 5) for i in range(2000))
    assert set(counts) == {1, 2, 3, 4, 5}
    assert max(counts.values()) < 500 > 330 < min(counts.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert [anchor.time(i, 25) for i in range(9)] == [Anchor(nn.Module(), 3.0, seed=2).time(i, 25) for i in range(9)]
    assert [anchor.time(i, 25) for i in range(9)] != [Anchor(nn.Module(), 1.0, seed=3).time(i, 25) for i in range(9)]


def recipe(tmp_path: Path, anchor: float, method: Any = None, train: Trained | None = None, **rollout: Any) -> Recipe:
    return toy_world.recipe(
        tmp_path,
        method or LeapAlign(),
        rollout=Rollout(**{"steps": 5, "batch": 4, "size": 16, **rollout}),
        optimiser=Optimiser(rate=1e-9, clip=1e9),
        guards=Guards(anchor=anchor),
        train=train or Trained(),
    )


def one_iteration(recipe: Recipe, by: float = 0.05) -> tuple[TrainingState, list[Tensor], Any, list[dict[str, Any]]]:
    """Run one iteration on changed weights: its gradient, its record, and the arguments of the transformer's calls."""
    world = toy_world.world(recipe)
    training, gradients, calls = TrainingState.start(recipe, world.module), list[Tensor](), list[dict[str, Any]]()
    add_noise(training.parameters, by)
    training.optimiser.step = lambda: gradients.extend(p.grad.clone() for p in training.parameters)
    world.module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    record = training_step(recipe, world, PromptCache(world.pipe, world.texts), training, 0.9)
    return training, gradients, record, calls


def leap_plans() -> Any:
    return FixedPlans((leapalign(4, 1, 0.3), leapalign(3, 2, 0.3)), count())


@pytest.mark.parametrize(
    "settings", [{}, {"memory": "staged"}, {"at_once": 3}, {"plans": 2, "memory": "recompute"}], ids=str
)
def test_a_pipeline_is_anchored_to_its_initial_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Compared with calls of the changed and the initial transformer with the pipeline's arguments."""
    training, anchored, record, calls = one_iteration(recipe(tmp_path, 1e5, leap_plans(), **settings))
    _, unanchored, plain, _ = one_iteration(recipe(tmp_path, 0.0, leap_plans(), **settings))
    assert plain.anchor is None
    assert record.reward == plain.reward
    assert record.loss == plain.loss
    base, squares = toy_world.pipeline().transformer.eval(), 0.0
    training.optimiser.zero_grad()
    for call in calls_at(training.anchor.time(1, 5), calls):
        v_base, v = base(**call)[0].detach(), training.module(**call)[0]
        square = (v - v_base).square().mean() * len(v) / 4
        (1e5 * square).backward()
        squares += float(square.detach())
    assert record.anchor == pytest.approx(squares, rel=1e-4)
    added = [g - b for g, b in zip(anchored, unanchored)]
    assert distance(added, [p.grad for p in training.parameters]) < VALUE[torch.float32]


def calls_at(t: int, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rollout's calls at t, one for each batch size (a batch of four comes as three and one)."""
    times = sorted({float(call["timestep"][0]) for call in calls})
    sizes: dict[int, dict[str, Any]] = {}
    for call in (c for c in calls if float(c["timestep"][0]) == times[t - 1]):
        plain = {name: v.detach() if isinstance(v, Tensor) else v for name, v in call.items()}
        sizes.setdefault(len(call["hidden_states"]), plain)
    return list(sizes.values())


def test_unchanged_weights_give_no_anchor_gradient(tmp_path: Path) -> None:
    _, anchored, record, _ = one_iteration(recipe(tmp_path, 100.0), by=0.0)
    _, unanchored, _, _ = one_iteration(recipe(tmp_path, 0.0), by=0.0)
    assert record.anchor == 0
    assert all(map(torch.equal, anchored, unanchored))


def test_adapters_are_anchored_to_the_model_without_them(tmp_path: Path) -> None:
    training, _, record, calls = one_iteration(recipe(tmp_path, 1.0, train=Trained(what="lora", rank=2)), by=0.3)
    assert sum(p.numel() for p in training.anchor.base) < 0.2 * sum(p.numel() for p in training.module.parameters())
    (call,) = calls_at(training.anchor.time(1, 5), calls)
    with torch.no_grad():
        v = training.module(**call)[0]
        training.module.disable_adapters()
        base = training.module(**call)[0]
    assert record.anchor > 1e-4
    assert record.anchor == pytest.approx(float((v - base).square().mean()), rel=1e-4)
