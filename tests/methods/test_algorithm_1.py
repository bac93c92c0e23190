"""The four methods against loops written from the paper's Algorithm 1: value, gradient and draws."""

from collections import Counter

import pytest
import torch

from tests.builders.problems import WAYS, cotangents, distance, problem, seeded
from tests.tolerances import EXACT
from trajsurgery import DRaFTLV, DRTune, LeapAlign, Plan, PlanError, ReFL, draft_lv, drtune, leapalign, refl, rollout
from trajsurgery.testing import MLP

STEPS = 6
P = problem(MLP(4, hidden=12, seed=7), STEPS)


def sigma(t):
    return P.sigmas[STEPS - t]


def one_step_leap_pred(x, v, k, j):
    return x - (sigma(k) - sigma(j)) * v


def step(x, v, t):
    return x - (sigma(t) - sigma(t - 1)) * v


def loop(method, t_min=1, train=(), t_k=None, t_j=None, alpha=1.0):
    """Algorithm 1, lines 9-40: the x_0 that the reward scores, with its gradient."""
    x_t = P.noise.detach()
    x_jk = x_0j = None
    for t in range(STEPS, 0, -1):
        grad_on = {
            "refl": t == t_min, "draft_lv": t == t_min, "leapalign": t in (t_k, t_j), "drtune": True,
        }[method]  # fmt: skip
        with torch.set_grad_enabled(grad_on):
            if method == "drtune":
                v_t = P.field(x_t.detach(), sigma(t))
                v_t = v_t if t in train else v_t.detach()
            elif method == "leapalign" and t == t_j:
                x_t = x_jk + (x_t - x_jk).detach()
                v_t = P.field(alpha * x_t + (1 - alpha) * x_t.detach(), sigma(t))
            else:
                v_t = P.field(x_t, sigma(t))
            if method in ("refl", "drtune") and t == t_min:
                return one_step_leap_pred(x_t, v_t, t, 0)
            if method == "leapalign":
                if t == t_k:
                    x_jk = one_step_leap_pred(x_t, v_t, t_k, t_j)
                elif t == t_j:
                    x_0j = one_step_leap_pred(x_t, v_t, t_j, 0)
                v_t, x_t = v_t.detach(), x_t.detach()
            x_t = step(x_t, v_t, t)
    return x_t if method == "draft_lv" else x_0j + (x_t - x_0j).detach()


def draft_lv_loop(n, generator):
    """Lines 42-47: the outputs whose reward gradients are summed."""
    outputs = [loop("draft_lv")]
    for _ in range(n):
        eps = torch.randn(P.noise.shape, generator=generator, dtype=torch.float64)
        x_1 = (1 - sigma(1)) * outputs[0].detach() + sigma(1) * eps
        outputs.append(step(x_1, P.field(x_1, sigma(1)), 1))
    return outputs


CASES = {
    "leapalign 5 2": (leapalign(5, 2, 0.3), lambda: [loop("leapalign", t_k=5, t_j=2, alpha=0.3)]),
    "leapalign T 1": (leapalign(6, 1, 0.1), lambda: [loop("leapalign", t_k=6, t_j=1, alpha=0.1)]),
    "leapalign next": (leapalign(3, 2, 1.0), lambda: [loop("leapalign", t_k=3, t_j=2)]),
    "drtune": (drtune(6, 2, {6, 3}), lambda: [loop("drtune", t_min=2, train={6, 3})]),
    "drtune at its stop": (drtune(6, 3, {3, 1}), lambda: [loop("drtune", t_min=3, train={3, 1})]),
    "drtune to the end": (drtune(6, 1, {5, 4, 1}), lambda: [loop("drtune", t_min=1, train={5, 4, 1})]),
    "refl": (refl(4), lambda: [loop("refl", t_min=4)]),
    "refl at T": (refl(6), lambda: [loop("refl", t_min=6)]),
    "draft_lv 0": (draft_lv(0), lambda: draft_lv_loop(0, seeded())),
    "draft_lv 2": (draft_lv(2), lambda: draft_lv_loop(2, seeded())),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_gradient_and_value(case, way):
    plan, reference = CASES[case]
    P.trajectory.noises.clear()
    expected = reference()
    out, got = WAYS[way](plan, P, P.params, P.field)
    for x, y in zip(out, expected, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=EXACT, atol=EXACT)
    gradient = torch.autograd.grad(expected, P.params, cotangents(expected))
    assert distance(got, gradient) <= EXACT


def test_draws_of_leapalign_are_uniform_over_pairs():
    generator, trials = torch.Generator().manual_seed(0), 3000
    counts = Counter()
    for _ in range(trials):
        plan = LeapAlign(0.3).draw(5, generator)
        k, j, _ = (node.t for node in plan.nodes if node.op in ("latent", "connect"))
        assert plan == Plan(*leapalign(k, j, 0.3).outputs, steps=5)
        counts[k, j] += 1
    assert set(counts) == {(k, j) for k in range(1, 6) for j in range(1, k)}
    expected = trials / 10
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 27.9  # chi-square of 9 degrees, p = 0.001


def test_draws_of_refl_stop_among_the_last_steps():
    generator = torch.Generator().manual_seed(0)
    stops = Counter(ReFL(3).draw(8, generator).nodes[0].t for _ in range(300))
    assert set(stops) == {1, 2, 3}
    assert min(stops.values()) > 60


def drtune_times(plan):
    """The training times and the stop of a drawn plan."""
    (output,) = plan.outputs
    return {node.t for node in plan.nodes if node.op == "velocity"}, output.x.t


def test_draws_of_drtune_train_evenly_spaced_times_before_the_stop():
    generator, steps = torch.Generator().manual_seed(0), 9
    seen = Counter()
    for _ in range(400):
        plan = DRTune(train=2, last=6).draw(steps, generator)
        train, stop = drtune_times(plan)
        assert train  # a draw with no training time before the stop is drawn again
        assert 1 <= stop <= 6
        assert min(train) >= stop
        if len(train) == 2:
            assert max(train) - min(train) == steps // 2
        seen[frozenset(train)] += 1
    assert {frozenset({s, s + 4}) for s in range(1, 6)} <= set(seen)


@pytest.mark.parametrize("train, last", [(1, 11), (1, 1), (9, 9), (3, 25)])
def test_drtune_redraws_until_a_time_trains(train, last):
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        times, stop = drtune_times(DRTune(train, last).draw(9, generator))
        assert max(times) >= stop


def test_leapalign_draws_within_its_window_and_distance():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        k, j, _ = (n.t for n in LeapAlign(window=(0, 0.5)).draw(10, generator).nodes if n.op in ("latent", "connect"))
        assert 5 >= k > j >= 1
        k, j, _ = (n.t for n in LeapAlign(distance=0.3).draw(10, generator).nodes if n.op in ("latent", "connect"))
        assert k - j == 3
    assert len([n for n in LeapAlign(leaps=4).draw(10, generator).nodes if n.op == "connect"]) == 4
    for bad in (LeapAlign(window=(0, 0.1)), LeapAlign(distance=1.0), LeapAlign(distance=0.3, leaps=3)):
        with pytest.raises(PlanError, match="LeapAlign"):
            bad.draw(10, generator)
    for window in ((0, 2), (-0.5, 1), (0.5, 0.4), (0.0, float("nan"))):
        with pytest.raises(PlanError, match="two shares of T"):
            LeapAlign(window=window).draw(10, generator)
    with pytest.raises(PlanError, match=r"1\.\.3"):
        DRTune(train=4).draw(3, generator)


@pytest.mark.parametrize("method", [LeapAlign(), ReFL(), DRTune(), DRaFTLV()])
def test_draws_depend_on_the_generator_only(method):
    assert method.draw(25, seeded(3)) == method.draw(25, seeded(3))
    assert method.draw(25, seeded(3)).steps == 25


def test_the_reference_rolls_out_as_rollout_does():
    x = P.noise.detach()
    for t in range(STEPS, 0, -1):
        x = step(x, P.field(x, sigma(t)).detach(), t)
    torch.testing.assert_close(x, rollout(P.field, P.noise, P.sigmas)[0], rtol=EXACT, atol=EXACT)
