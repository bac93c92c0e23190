"""The anchor's gradient is the formula's, in float64; it holds to the untuned model, whatever trains and however."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, vjp

from tests.builders import toy_world
from tests.builders.problems import distance
from tests.tolerances import GRADIENT, VALUE
from tests.training.test_several_plans import Given
from trajsurgery import LeapAlign, Trajectory, leapalign, rollout
from trajsurgery.testing import MLP
from trajsurgery.training.anchor import Anchor, swapped
from trajsurgery.training.checkpoint import TrainingState
from trajsurgery.training.components import PromptCache
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Guards, Optimiser, Rollout, Trained
from trajsurgery.training.training_loop import training_step


def moved(parameters: Any, by: float, seed: int = 0) -> None:
    """Trains, so to speak: adds Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.fixture
def case() -> tuple[MLP, dict[str, Tensor], Anchor, Trajectory]:
    """A field that has moved, its weights before, an anchor with c = 0.7, and a rollout of the field as it is."""
    field = MLP(4, seed=3)
    before = {name: p.detach().clone() for name, p in field.named_parameters()}
    anchor = Anchor(list(field.parameters()), 0.7, seed=5)
    moved(field.parameters(), 0.1)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return field, before, anchor, rollout(field, noise, torch.linspace(1, 0, 9, dtype=torch.float64))


def formula(field: MLP, before: dict[str, Tensor], x: Tensor, sigma: Tensor, c: float) -> dict[str, Tensor]:
    """2 c / n * (dv/dtheta)^T (v - v_base)."""
    now = {name: p.detach() for name, p in field.named_parameters()}
    v, back = vjp(lambda theta: functional_call(field, theta, (x, sigma)), now)
    base = functional_call(field, before, (x, sigma))
    return back(2 * c / v.numel() * (v - base))[0]


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_the_gradient_is_the_formula(case: Any, iteration: int) -> None:
    field, before, anchor, trajectory = case
    t = anchor.time(iteration, trajectory.steps)
    x, sigma = trajectory[t], trajectory.sigma(t)
    wanted = formula(field, before, x, sigma, 0.7)
    there = [torch.full_like(p, 0.25) for p in field.parameters()]
    for p, grad in zip(field.parameters(), there):
        p.grad = grad.clone()
    found = anchor.add_gradient(field, trajectory, iteration, share=0.5)
    added = [p.grad - grad for p, grad in zip(field.parameters(), there)]
    assert distance(added, [0.5 * wanted[name] for name, _ in field.named_parameters()]) < GRADIENT
    apart = field(x, sigma) - functional_call(field, before, (x, sigma))
    torch.testing.assert_close(found, apart.detach().square().mean(), rtol=VALUE[torch.float64], atol=0)


def test_the_gradient_is_the_slope(case: Any) -> None:
    """c * mean |v - v_base|^2 at a fixed x_t, by central differences in a random direction of all weights."""
    field, before, anchor, trajectory = case
    t = anchor.time(1, trajectory.steps)
    anchor.add_gradient(field, trajectory, 1)
    way = [torch.randn(p.shape, generator=torch.Generator().manual_seed(9), dtype=p.dtype) for p in field.parameters()]

    @torch.no_grad()
    def value(step: float) -> float:
        theta = {n: p + step * w for (n, p), w in zip(field.named_parameters(), way)}
        x, sigma = trajectory[t], trajectory.sigma(t)
        v, base = (functional_call(field, weights, (x, sigma)) for weights in (theta, before))
        return 0.7 * float((v - base).square().mean())

    slope = sum(float((p.grad * w).sum()) for p, w in zip(field.parameters(), way))
    h = 1e-4
    fourth = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert slope == pytest.approx(fourth, rel=1e-9)


def test_weights_and_their_copies_stay_what_they_are(case: Any) -> None:
    field, before, anchor, trajectory = case
    now = [p.detach().clone() for p in field.parameters()]

    def failing(x: Tensor, sigma: Tensor) -> Tensor:
        raise RuntimeError("no field")

    with pytest.raises(RuntimeError, match="no field"):
        anchor.add_gradient(failing, trajectory, 1)
    anchor.add_gradient(field, trajectory, 1)
    assert all(map(torch.equal, field.parameters(), now))
    assert all(map(torch.equal, anchor.base, before.values()))
    with swapped(now, anchor.base):
        assert all(map(torch.equal, now, before.values()))


def test_times_are_uniform_and_follow_from_seed_and_iteration() -> None:
    anchor = Anchor([], 1.0, seed=2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    counts = Counter(anchor.time(i, 5) for i in range(2000))
    assert set(counts) == {1, 2, 3, 4, 5}
    assert max(counts.values()) < 500 > 330 < min(counts.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert [anchor.time(i, 25) for i in range(9)] == [Anchor([], 3.0, seed=2).time(i, 25) for i in range(9)]
    assert [anchor.time(i, 25) for i in range(9)] != [Anchor([], 1.0, seed=3).time(i, 25) for i in range(9)]


def recipe(tmp_path: Path, anchor: float, method: Any = None, train: Trained | None = None, **rollout: Any) -> Recipe:
    return toy_world.recipe(
        tmp_path,
        method or LeapAlign(),
        rollout=Rollout(**{"steps": 5, "batch": 4, "size": 16, **rollout}),
        optimiser=Optimiser(rate=1e-9, clip=1e9),
        guards=Guards(anchor=anchor),
        train=train or Trained(),
    )


def first(recipe: Recipe, by: float = 0.05) -> tuple[TrainingState, list[Tensor], Any, list[dict[str, Any]]]:
    """One iteration on weights that have moved: its gradient, its record, and what the transformer was called with."""
    world = toy_world.world(recipe)
    training, found, calls = TrainingState.start(recipe, world.module), list[Tensor](), list[dict[str, Any]]()
    moved(training.parameters, by)
    training.optimiser.step = lambda: found.extend(p.grad.clone() for p in training.parameters)
    world.module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    record = training_step(recipe, world, PromptCache(world.pipe, world.texts), training, 0.9)
    return training, found, record, calls


def methods() -> Any:
    return Given((leapalign(4, 1, 0.3), leapalign(3, 2, 0.3)), count())


@pytest.mark.parametrize(
    "way", [{}, {"memory": "staged"}, {"at_once": 3}, {"plans": 2, "memory": "recompute"}], ids=str
)
def test_a_pipeline_is_held_to_what_it_was(tmp_path: Path, way: dict[str, Any]) -> None:
    """Against the transformers themselves, the moved one and a fresh one, called as the pipeline called them."""
    training, found, record, calls = first(recipe(tmp_path, 1e5, methods(), **way))
    _, bare, plain, _ = first(recipe(tmp_path, 0.0, methods(), **way))
    assert plain.anchor is None
    assert record.reward == plain.reward
    assert record.loss == plain.loss
    base, squares = toy_world.pipeline().transformer.eval(), 0.0
    training.optimiser.zero_grad()
    for call in at(training.anchor.time(1, 5), calls):
        held, v = base(**call)[0].detach(), training.module(**call)[0]
        square = (v - held).square().mean() * len(v) / 4
        (1e5 * square).backward()
        squares += float(square.detach())
    assert record.anchor == pytest.approx(squares, rel=1e-4)
    added = [g - b for g, b in zip(found, bare)]
    assert distance(added, [p.grad for p in training.parameters]) < VALUE[torch.float32]


def at(t: int, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rollout's calls at t, one for each size of a batch (a batch of four comes as three and one)."""
    times = sorted({float(call["timestep"][0]) for call in calls})
    sizes: dict[int, dict[str, Any]] = {}
    for call in (c for c in calls if float(c["timestep"][0]) == times[t - 1]):
        plain = {name: v.detach() if isinstance(v, Tensor) else v for name, v in call.items()}
        sizes.setdefault(len(call["hidden_states"]), plain)
    return list(sizes.values())


def test_nothing_is_held_before_anything_has_moved(tmp_path: Path) -> None:
    _, found, record, _ = first(recipe(tmp_path, 100.0), by=0.0)
    _, bare, _, _ = first(recipe(tmp_path, 0.0), by=0.0)
    assert record.anchor == 0
    assert all(map(torch.equal, found, bare))


def test_adapters_are_held_to_the_model_without_them(tmp_path: Path) -> None:
    training, _, record, calls = first(recipe(tmp_path, 1.0, train=Trained(what="lora", rank=2)), by=0.3)
    assert sum(p.numel() for p in training.anchor.base) < 0.2 * sum(p.numel() for p in training.module.parameters())
    (call,) = at(training.anchor.time(1, 5), calls)
    with torch.no_grad():
        v = training.module(**call)[0]
        training.module.disable_adapters()
        base = training.module(**call)[0]
    assert record.anchor > 1e-4
    assert record.anchor == pytest.approx(float((v - base).square().mean()), rel=1e-4)
