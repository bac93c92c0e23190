"""The loss: hinge, similarity weights, sums over outputs; the reward's graph is freed before the model's backward."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders.problems import Problem, distance, problem
from tests.tolerances import EXACT
from trajsurgery import Plan, RecipeError, apply, backward, distances, latent, rollout
from trajsurgery.methods import (
    DRaFTLV,
    DRTune,
    LeapAlign,
    ReFL,
    draft_k,
    draft_lv,
    drtune,
    flowbp_bridge,
    flowbp_lagrange,
    flowbp_sparse,
    leapalign,
    leaps,
    refl,
)
from trajsurgery.testing import MLP
from trajsurgery.training.objective import (
    Weights,
    cotangents,
    hinge,
    landings,
    loss,
    measured_landings,
    weights,
)
from trajsurgery.training.settings import Objective


def test_the_hinge_is_zero_above_the_threshold() -> None:
    scores = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    losses = hinge(scores, 0.5)
    torch.testing.assert_close(losses, torch.tensor([0.3, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    assert gradient[0] == -1
    assert gradient[2] == 0


def test_outputs_are_summed_and_the_batch_averaged() -> None:
    w = torch.tensor([2.0, 4.0])
    value = loss([torch.tensor([0.0, 0.5]), torch.tensor([1.0, 3.0])], w, threshold=2.0)
    assert float(value) == pytest.approx((2 * 2.0 + 4 * 1.5) / 2 + (2 * 1.0 + 0) / 2)


def test_weights_are_constants() -> None:
    w = torch.ones(2, requires_grad=True)
    scores = torch.zeros(2, requires_grad=True)
    assert torch.autograd.grad(loss([scores], w, 1.0), [scores, w], allow_unused=True)[1] is None


def similarity_weights(p: Problem, plan: Plan, where: Any = "all", tau: float = 0.1) -> Weights:
    return weights(plan, p.trajectory, distances(plan, p.trajectory, p.field), where, tau)


@pytest.mark.parametrize("tau", [1e-6, 0.1, 10.0])
def test_the_weights_of_leapalign_are_eq_12(rolled: Problem, tau: float) -> None:
    k, j, x, sigma = 6, 3, rolled.trajectory, rolled.trajectory.sigma
    d_j = (x[j] - (x[k] - (sigma(k) - sigma(j)) * x.velocity(k))).abs().mean(1)
    d_0 = (x[0] - (x[j] - sigma(j) * x.velocity(j))).abs().mean(1)
    measured = similarity_weights(rolled, leapalign(k, j), tau=tau)
    torch.testing.assert_close(measured.w, 1 / (d_j.clamp(min=tau) + d_0.clamp(min=tau)))
    assert float(measured.clamped) == pytest.approx(float((torch.stack([d_j, d_0]) <= tau).double().mean()))


def test_the_times_of_the_weights_can_be_chosen(rolled: Problem) -> None:
    plan, tau = leapalign(6, 3), 1e-6
    d = distances(plan, rolled.trajectory, rolled.field)
    torch.testing.assert_close(similarity_weights(rolled, plan, (0,), tau).w, 1 / d[0])
    torch.testing.assert_close(similarity_weights(rolled, plan, "j", tau).w, 1 / d[3])
    torch.testing.assert_close(
        similarity_weights(rolled, plan, (3, 0), tau).w, similarity_weights(rolled, plan, "all", tau).w
    )
    assert torch.equal(similarity_weights(rolled, plan, "none", tau).w, torch.ones(3))
    assert torch.equal(similarity_weights(rolled, plan, (5,), tau).w, torch.ones(3))


def test_weights_do_not_depend_on_the_reward_s_input(rolled: Problem) -> None:
    """Fig. 4c: the reward is of x^_0|j, the weights are of d_j and d_0."""
    unconnected = Plan(latent(6).leap(3).connect().leap(0, discount=0.3))
    assert torch.equal(similarity_weights(rolled, unconnected).w, similarity_weights(rolled, leapalign(6, 3)).w)


@pytest.mark.parametrize(
    "plan, times",
    [
        (leapalign(6, 3), (3, 0)),
        (leapalign(4, 3), (3, 0)),
        (leapalign(6, 1), (1, 0)),
        (leapalign(2, 1), (1, 0)),
        (leaps((2, 1), 0.3, "prediction"), (1, 0)),
        (leaps((2, 1), 0.3, "prediction", straight=False), (1, 0)),
        (Plan(latent(2).leap(1).discount(0.5).connect().leap(0).discount(0.5)), (1, 0)),
        (leaps((7, 5, 2)), (5, 2, 0)),
        (drtune(8, 4, {8, 5}), (0,)),
        (drtune(8, 1, {8}), ()),
        (refl(5), (0,)),
        (refl(1), ()),
        (draft_lv(1), (0,)),
        (draft_k(4), ()),
        (flowbp_sparse(8, {3}), (0,)),
        (flowbp_bridge(8, 4, {6}), (4, 0)),
        (flowbp_lagrange(6, 3), (3, 0)),
    ],
)
def test_of_the_sampler_s_steps_only_connected_ones_are_measured(
    rolled: Problem, plan: Plan, times: tuple[int, ...]
) -> None:
    assert landings(plan, rolled.trajectory) == times


def test_without_a_prediction_the_weight_is_one(rolled: Problem) -> None:
    steps_alone = similarity_weights(rolled, drtune(8, 1, {8}))
    assert torch.equal(steps_alone.w, torch.ones(3))
    assert float(steps_alone.clamped) == 0


@pytest.mark.parametrize("reward_at", ["image", "prediction"])
def test_the_weights_of_all_pairs_of_a_sampler_are_eq_12(mlp: MLP, reward_at: Any) -> None:
    """All 300 pairs of 25 steps, the 47 among them that hold a step of the sampler; d from its latents by Eq. 4-5."""
    steps, tau = 25, 0.1
    sigmas = [3 * s / (1 + 2 * s) for s in (t / steps for t in range(steps, -1, -1))]  # SD3's shift
    noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = rollout(mlp, noise, sigmas)
    own_steps = 0
    for k, j in itertools.combinations(range(steps, 0, -1), 2):
        miss = {end: (x[end] - x[start] + (x.sigma(start) - x.sigma(end)) * x.velocity(start)).abs().mean(1)
                for start, end in ((k, j), (j, 0))}  # fmt: skip
        plan = leaps((k, j), 0.3, reward_at)
        measured = weights(plan, x, distances(plan, x, mlp), "all", tau)
        torch.testing.assert_close(measured.w, 1 / (miss[j].clamp(min=tau) + miss[0].clamp(min=tau)))
        own_steps += any(float(d.max()) < EXACT for d in miss.values())
    assert own_steps == 47


def test_each_method_has_default_times() -> None:
    defaults = {method.__name__: method.weights_at for method in (LeapAlign, DRTune, ReFL, DRaFTLV)}
    assert defaults == {"LeapAlign": "all", "DRTune": "none", "ReFL": "none", "DRaFTLV": "none"}


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(RecipeError, match='"all", "none", "j"'):
        measured_landings("k", (3, 0))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "wrong", [{"tau": 0.0}, {"tau": math.nan}, {"tau": -1.0}, {"threshold": math.inf}, {"threshold": math.nan}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="objective"):
        Objective(**wrong)  # pyright: ignore[reportArgumentType]


def algorithm_1(p: Problem, k: int, j: int, alpha: float, tau: float, lambda_: float) -> list[Tensor]:
    """LeapAlign's gradient as a plain loop, from Algorithm 1 and Eq. 11-13."""
    x, saved = p.noise.detach(), {}
    steps = len(p.sigmas) - 1
    prediction = start = torch.zeros(())
    for t in range(steps, 0, -1):
        sigma, after = p.sigmas[steps - t], p.sigmas[steps - t + 1]
        if t == j:
            real = x
            x = prediction + (x - prediction).detach()
            start = x
            v = p.field(alpha * x + (1 - alpha) * x.detach(), sigma)
            saved["d_j"] = (real - prediction).abs().mean(1)
            prediction = start - sigma * v
        else:
            v = p.field(x, sigma)
        if t == k:
            prediction = x - (sigma - p.sigmas[steps - j]) * v
        x = x.detach() + (after - sigma) * v.detach()
    w = 1 / (saved["d_j"].clamp(min=tau) + (x - prediction).abs().mean(1).clamp(min=tau)).detach()
    x_0 = prediction + (x - prediction).detach()
    value = (w * (lambda_ - x_0.sin().sum(1)).clamp(min=0)).mean()
    return list(torch.autograd.grad(value, p.params))


@pytest.mark.parametrize("k, j", [(6, 3), (4, 3), (6, 1), (2, 1)])
@pytest.mark.parametrize("memory", ["retain", "recompute", "staged"])
def test_the_whole_gradient_is_that_of_algorithm_1(mlp: MLP, memory: Any, k: int, j: int) -> None:
    p, plan = problem(mlp), leapalign(k, j, 0.3)
    expected = algorithm_1(p, k, j, 0.3, tau=0.05, lambda_=2.0)
    output = apply(plan, p.trajectory, p.field, "retain" if memory == "staged" else memory)
    assert isinstance(output, Tensor)
    if memory == "staged":
        output = output.detach().requires_grad_()
    value = loss([output.sin().sum(1)], similarity_weights(p, plan, tau=0.05).w, 2.0)
    cotangent = cotangents(value, (output,))
    if memory == "staged":
        backward(plan, p.trajectory, p.field, cotangent)
        gradients = [parameter.grad for parameter in p.params]
    else:
        gradients = list(torch.autograd.grad(output, p.params, cotangent))
    assert distance([g for g in gradients if g is not None], expected) < EXACT


class SavesActivation(torch.autograd.Function):
    """The identity; saves an activation for its backward pass, as a reward model does."""

    alive: weakref.ref[Tensor]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        activation = x.clone()
        ctx.save_for_backward(activation)
        SavesActivation.alive = weakref.ref(activation)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad + 0 * ctx.saved_tensors[0]


def test_the_reward_s_graph_is_freed_before_the_model_s_backward_pass(rolled: Problem) -> None:
    activation_alive: list[bool] = []
    plan = leapalign(6, 3)

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        v = rolled.field(x, sigma)
        if v.requires_grad:
            v.register_hook(lambda grad: activation_alive.append(SavesActivation.alive() is not None))
        return v

    output = apply(plan, rolled.trajectory, field, "recompute", params=rolled.params)
    value = loss([SavesActivation.apply(output).sum(1)], torch.ones(3), 100.0)
    assert SavesActivation.alive() is not None
    cotangent = cotangents(value, (output,))
    torch.autograd.backward([output], list(cotangent))
    assert activation_alive
    assert not any(activation_alive)


def test_a_reward_that_detaches_is_an_error(rolled: Problem) -> None:
    output = apply(leapalign(6, 3), rolled.trajectory, rolled.field)
    assert isinstance(output, Tensor)
    with pytest.raises(RecipeError, match="carry no gradient"):
        cotangents(loss([output.detach().sum(1)], torch.ones(3), 1.0), (output,))
