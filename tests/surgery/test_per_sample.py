"""One plan for each sample: the gradient is the sum of the samples' closed forms, in every way of running."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.builders import toy_world
from tests.builders.examples import few_examples
from tests.builders.pipelines.every import BUILDERS
from tests.builders.problems import cotangents, distance, outputs, problem, seeded
from tests.builders.small_transformers import float64_throughout, flux, sd3
from tests.tolerances import EXACT, GRADIENT, STOCK
from tests.training.test_several_plans import FixedPlans
from tests.training.test_training_loop import gradient, run_loop
from trajsurgery import (
    DRTune,
    LeapAlign,
    PerSample,
    Plan,
    PlanError,
    SamplerError,
    apply,
    backward,
    distances,
    draft_lv,
    drtune,
    latent,
    leapalign,
    noise,
    operate,
    refl,
    sample,
    values,
)
from trajsurgery.testing import MLP, plans
from trajsurgery.training.objective import weights

STEPS, DIM, BATCH = 5, 4, 3
FIELD = MLP(DIM, seed=11)
P = problem(FIELD, STEPS, (BATCH, DIM))
ONE = plans(STEPS, size=8).filter(lambda plan: len(plan.outputs) == 1 and "noise" not in str(plan.to_dict()))


def closed(plan: PerSample, p: Any, cs: list[Tensor]) -> list[Tensor]:
    """The sum of the single plans' closed forms, each with the cotangent of its sample only."""
    total = [torch.zeros_like(leaf) for leaf in p.params]
    for i, single in enumerate(plan.plans):
        alone = [torch.zeros_like(c).index_copy(0, torch.tensor([i]), c[i : i + 1]) for c in cs]
        part = single.gradient().evaluate(p.trajectory, p.field, alone, params=p.params)
        total = [a + b for a, b in zip(total, part, strict=True)]
    return total


def gradient_errors(plan: PerSample, p: Any) -> list[float]:
    """The distance of every way of running from the closed forms."""
    out = outputs(apply(plan, p.trajectory, p.field, generator=seeded()))
    cs = cotangents(out)
    expected = closed(plan, p, cs)
    again = outputs(apply(plan, p.trajectory, p.field, "recompute", generator=seeded()))
    got = [torch.autograd.grad(of, p.params, cs, allow_unused=True, materialize_grads=True) for of in (out, again)]
    for leaf in p.params:
        leaf.grad = None
    backward(plan, p.trajectory, p.field, cs, generator=seeded())
    staged = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in p.params]
    return [distance(g, expected) for g in (*got, staged)]


@given(st.lists(ONE, min_size=BATCH, max_size=BATCH))
@example([leapalign(4, 2, 0.3), drtune(5, 2, {4, 3}), refl(3)])  # other numbers of calls
@example([leapalign(4, 2, 0.3), leapalign(2, 1, 0.3), leapalign(5, 4, 0.3)])
@example([leapalign(4, 2, 0.3)] * BATCH)
def test_the_gradient_is_the_sum_of_the_closed_forms(drawn: list[Plan]) -> None:
    P.trajectory.noises.clear()
    assert max(gradient_errors(PerSample(drawn), P)) <= GRADIENT


PAIRS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda pair: pair[0] > pair[1]), min_size=2, max_size=2
)


@pytest.mark.parametrize("make", [flux, sd3])
@few_examples(5)
@given(PAIRS)
@example([(4, 1), (3, 2)])
def test_the_gradient_is_the_sum_of_the_closed_forms_on_transformers(make: Any, pairs: list[tuple[int, int]]) -> None:
    with float64_throughout():
        p = problem(make(), 4, (2, *make().shape))
        assert max(gradient_errors(PerSample(leapalign(k, j, 0.3) for k, j in pairs), p)) <= GRADIENT


def test_values_and_distances_are_those_of_each_sample() -> None:
    each = [leapalign(4, 2, 0.3), refl(3), leapalign(3, 2, 0.3)]
    by_time = distances(PerSample(each), P.trajectory, FIELD)
    for i, plan in enumerate(each):
        alone = distances(plan, P.trajectory, FIELD)
        assert {t for t, d in by_time.items() if not d[i].isnan()} == set(alone)
        for t, d in alone.items():
            torch.testing.assert_close(by_time[t][i], d[i], rtol=EXACT, atol=EXACT)
        actual, expected = values(PerSample(each), P.trajectory, FIELD)[i], values(plan, P.trajectory, FIELD)[i]
        torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("where", ["all", "j", "none", (0,)])
def test_weights_are_those_of_each_sample(where: Any) -> None:
    """A leap that is the sampler's step is left out for its sample only."""
    each = [leapalign(4, 2, 0.3), leapalign(5, 1, 0.3), leapalign(3, 2, 0.3)]
    actual = weights(PerSample(each), P.trajectory, distances(PerSample(each), P.trajectory, FIELD), where, 1e-3)
    expected = [weights(plan, P.trajectory, distances(plan, P.trajectory, FIELD), where, 1e-3) for plan in each]
    apart = torch.stack([w.w[i] for i, w in enumerate(expected)])
    torch.testing.assert_close(actual.w.double(), apart.double(), rtol=EXACT, atol=EXACT)


def test_a_batch_costs_as_many_calls_as_its_longest_plan() -> None:
    seen: list[Tensor] = []

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return FIELD(x, sigma)

    each = [leapalign(4, 2, 0.3), refl(3), leapalign(5, 2, 0.3)]
    apply(PerSample(each), P.trajectory, field)
    s = P.trajectory.sigma
    assert [at.tolist() for at in seen] == [[s(4), s(3), s(5)], s(2).tolist()]  # the idle sample joins the others
    seen.clear()
    assert torch.equal(apply(PerSample([leapalign(4, 2)] * BATCH), P.trajectory, field), P.trajectory[0])
    assert [at.dim() for at in seen] == [0, 0]


def test_noise_gets_the_gradient_of_its_sample_only() -> None:
    start = noise()
    for t in range(STEPS, 0, -1):
        start = start.leap(t - 1)
    each = [Plan(start), leapalign(4, 2, 0.3), Plan(latent(0).renoise(3).leap(0))]
    c = torch.ones(BATCH, DIM, dtype=torch.float64)
    for memory in ("retain", "recompute"):
        P.noise.grad = None
        apply(PerSample(each), P.trajectory, FIELD, memory, generator=seeded()).backward(c)
        assert P.noise.grad is not None
        assert P.noise.grad[0].abs().min() > 0
        assert not P.noise.grad[1:].any()
    for leaf in (P.noise, *P.params):
        leaf.grad = None


@pytest.mark.parametrize("name", ["Flux", "SD3"])  # SD3: real guidance, the model's batch is doubled
def test_the_gradient_is_the_sum_of_the_closed_forms_through_a_pipeline(name: str) -> None:
    small = BUILDERS[name]()
    with operate(small.pipe) as surgery:
        small()
    trajectory, field = surgery.trajectory, surgery.field
    params, c = list(small.pipe.transformer.parameters()), torch.randn_like(trajectory[0])
    each = [leapalign(4, 1, 0.3), leapalign(2, 1, 0.3)]
    expected = [torch.zeros_like(p) for p in params]
    for i, plan in enumerate(each):
        alone = torch.zeros_like(c).index_copy(0, torch.tensor([i]), c[i : i + 1])
        part = plan.gradient().evaluate(trajectory, field, alone, params=params)
        expected = [a + b for a, b in zip(expected, part, strict=True)]
    for memory in ("retain", "recompute"):
        out = apply(PerSample(each), trajectory, field, memory)
        assert torch.equal(out, trajectory[0])
        got = torch.autograd.grad(out, params, c, allow_unused=True, materialize_grads=True)
        assert distance(got, expected) <= STOCK


def test_a_pipeline_with_more_inputs_that_depend_on_time_is_refused() -> None:
    small = BUILDERS["Flux inpaint"]()
    with operate(small.pipe) as surgery:
        small()
    with pytest.raises(SamplerError, match="more depends on the time"):
        apply(PerSample([leapalign(3, 2), leapalign(2, 1)]), surgery.trajectory, surgery.field)


def test_invalid_plans_per_sample_are_refused() -> None:
    with pytest.raises(PlanError, match="2 plans for a batch of 3"):
        apply(PerSample([refl(1)] * 2), P.trajectory, FIELD)
    with pytest.raises(PlanError, match="received none"):
        PerSample([])
    with pytest.raises(PlanError, match="received a int"):
        PerSample([3])  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match="of 1 and 3 outputs"):
        PerSample([refl(1), draft_lv(2)])
    with pytest.raises(PlanError, match="where one plan is wanted"):
        sample(PerSample([refl(1)] * BATCH), FIELD, P.noise, P.sigmas)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("memory", ["retain", "recompute", "staged"])
def test_a_recipe_with_equal_plans_gives_the_shared_plan_s_gradient(memory: str, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    one = FixedPlans((leapalign(4, 1, 0.3),), count())
    shared = gradient(recipe, one)
    assert distance(gradient(recipe, one, times="per-sample", memory=memory), shared) < 1e-5
    mixed = FixedPlans((leapalign(4, 1, 0.3), leapalign(3, 2, 0.3)), count())
    separate = gradient(recipe, mixed, times="per-sample", memory=memory)
    assert distance(separate, shared) > 1e-2
    mixed = FixedPlans(mixed.plans, count())
    assert distance(gradient(recipe, mixed, times="per-sample", memory=memory, at_once=2), separate) < 1e-5


@pytest.mark.parametrize("method", [LeapAlign(), DRTune(last=3)], ids=str)
def test_methods_learn_with_times_per_sample(method: Any, tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path, method)
    rollout = replace(recipe.rollout, times="per-sample", memory="recompute")
    _, seen = run_loop(replace(recipe, rollout=rollout))
    assert seen[-1].reward > seen[0].reward + 0.03
    assert all(record.grad_norm > 0 and not record.skipped for record in seen)
