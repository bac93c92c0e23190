"""The methods beyond Algorithm 1 against loops written from their descriptions: value, gradient and draws."""

from collections import Counter

import pytest
import torch

from tests.problems import WAYS, cotangents, distance, problem, seeded
from tests.tolerances import EXACT
from trajsurgery import (
    SRPO,
    AlignProp,
    DRaFT1,
    DRaFTK,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    PlanError,
    ReFL,
    ReNO,
    WholeTrajectory,
    draft_k,
    flowbp_bridge,
    flowbp_lagrange,
    flowbp_sparse,
    leaps,
    srpo,
    whole_trajectory,
)
from trajsurgery.methods import reno
from trajsurgery.testing import MLP, check_gradient

STEPS = 6
P = problem(MLP(4, hidden=12, seed=7), STEPS)
X, V = P.trajectory, P.trajectory.velocity


def s(t):
    return P.sigmas[STEPS - t]


def h(t):
    return s(t - 1) - s(t)


def fresh(t, x=None):
    return P.field((X[t] if x is None else x).detach(), s(t))


def discounted(x, alpha):
    return alpha * x + (1 - alpha) * x.detach()


def real(prediction, t):
    return prediction + (X[t] - prediction).detach()


def through_the_last(k):
    x = X[k].detach()
    for t in range(k, 0, -1):
        x = x + h(t) * P.field(x, s(t))
    return x


def gained(v, gain):
    return gain * v + (1 - gain) * v.detach()


def sparse(active, rescale=1.0):
    gain = 1 + rescale * ((s(0) - s(STEPS)) / sum(h(t) for t in active) - 1)
    x = X[STEPS].detach()
    for t in range(STEPS, 0, -1):
        v = fresh(t)
        x = x + h(t) * (gained(v, gain) if t in active else v.detach())
    return x


def bridge(j, active, alpha, rescale=1.0):
    """Two compositions with one factor over all active steps, as the authors' `sample_flowbp_bridge_trajectory`."""
    x, live = X[STEPS].detach(), {*active, j}
    gain = 1 + rescale * ((s(0) - s(STEPS)) / sum(h(t) for t in live) - 1)
    for start, stop in ((STEPS, j), (j, 0)):
        for t in range(start, stop, -1):
            v = P.field(discounted(x, alpha), s(t)) if t == j else fresh(t)
            x = x + h(t) * (gained(v, gain) if t in live else v.detach())
        x = real(x, stop)
    return x


def quadratic(nodes, start, stop):
    """Weights that integrate polynomials through the nodes: solved from their moments, not from Lagrange's formula."""
    powers = range(len(nodes))
    moments = torch.stack([(stop ** (p + 1) - start ** (p + 1)) / (p + 1) for p in powers])
    return torch.linalg.solve(torch.stack([torch.stack([n**p for n in nodes]) for p in powers]), moments)


def spread(start, stop, order=3):
    """Evenly spread velocities of the steps from start to stop, as the authors' `_select_interval_support_indices`."""
    steps = list(range(start, stop, -1))
    return steps if len(steps) <= order else [steps[i] for i in torch.linspace(0, len(steps) - 1, order).round().int()]


def lagrange(k, j, alpha, quarter, rescale=0.5):
    x = X[k].detach()
    for start, stop in ((k, j), (j, 0)):
        times = spread(start, stop)
        ws = quadratic([s(t) for t in times], s(start), s(stop))
        gain = 1 + rescale * (ws.abs().sum() / ws[:2].abs().sum() - 1)
        first = P.field(discounted(x, alpha) if start == j else x, s(start))
        vs = [gained(first, gain), *(gained(discounted(fresh(t), quarter), gain) for t in times[1:2])]
        vs += [V(t) for t in times[2:]]
        x = real(x + sum(w * v for w, v in zip(ws, vs, strict=True)), stop)
    return x


def known_noise(k, j, eps=None):
    eps = P.noise.detach() if eps is None else eps
    x_k = (1 - s(k)) * X[0] + s(k) * eps
    x_j = x_k + (s(j) - s(k)) * P.field(x_k, s(k))
    return (x_j - s(j) * eps) / (1 - s(j))


def drawn():
    return torch.randn(P.noise.shape, generator=seeded(), dtype=torch.float64)


def leaping(times, alpha, connected, straight):
    x, first = X[times[0]].detach(), True
    for t, to in zip(times, [*times[1:], 0], strict=True):
        v = P.field(x if first else discounted(x, alpha), s(t))
        x = (x if straight else x.detach()) + (s(to) - s(t)) * v
        x = real(x, to) if connected or to else x
        first = False
    return x


SIGMAS = P.sigmas.tolist()
CASES = {
    "DRaFT-1": (draft_k(1), lambda: through_the_last(1)),
    "DRaFT-3": (draft_k(3), lambda: through_the_last(3)),
    "the whole trajectory": (draft_k(6), lambda: through_the_last(6)),
    "sparse": (flowbp_sparse(6, {6, 3, 2}, SIGMAS), lambda: sparse({6, 3, 2})),
    "sparse at one": (flowbp_sparse(6, {4}, SIGMAS), lambda: sparse({4})),
    "sparse, half made up for": (flowbp_sparse(6, {6, 1}, SIGMAS, 0.5), lambda: sparse({6, 1}, 0.5)),
    "bridge": (flowbp_bridge(6, 3, {5, 1}, 0.3, SIGMAS), lambda: bridge(3, {5, 1}, 0.3)),
    "bridge at 1": (flowbp_bridge(6, 1, {2}, 0.5, SIGMAS), lambda: bridge(1, {2}, 0.5)),
    "bridge as it is": (flowbp_bridge(6, 4, {6, 2}, 0.3, SIGMAS, 0.0), lambda: bridge(4, {6, 2}, 0.3, 0.0)),
    "lagrange": (flowbp_lagrange(6, 3, sigmas=SIGMAS), lambda: lagrange(6, 3, 0.1, 0.25)),
    "lagrange, long": (flowbp_lagrange(6, 5, sigmas=SIGMAS), lambda: lagrange(6, 5, 0.1, 0.25)),
    "lagrange next": (flowbp_lagrange(3, 2, 0.4, 0.5, SIGMAS), lambda: lagrange(3, 2, 0.4, 0.5)),
    "lagrange at 1": (flowbp_lagrange(5, 1, 0.4, 0.2, SIGMAS, 1.0), lambda: lagrange(5, 1, 0.4, 0.2, 1.0)),
    "lagrange as it is": (flowbp_lagrange(6, 2, 0.4, rescale=0), lambda: lagrange(6, 2, 0.4, 0.25, 0.0)),
    "srpo": (srpo(4, 2), lambda: known_noise(4, 2)),
    "srpo, a noise of its own": (srpo(4, 2, draw=0), lambda: known_noise(4, 2, drawn())),
    "srpo, inversion": (srpo(2, 5), lambda: known_noise(2, 5)),
    "reward at the prediction": (leaps((5, 2), 0.3, "prediction"), lambda: leaping((5, 2), 0.3, False, True)),
    "nested only": (leaps((5, 2), 0.3, straight=False), lambda: leaping((5, 2), 0.3, True, False)),
    "nested only, three": (leaps((5, 3, 2), 0.3, straight=False), lambda: leaping((5, 3, 2), 0.3, True, False)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_gradient_and_value(case, way):
    plan, reference = CASES[case]
    P.trajectory.noises.clear()
    wanted = reference()
    (found,), got = WAYS[way](plan, P, P.params, P.field)
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=EXACT, atol=EXACT)
    gradient = torch.autograd.grad(wanted, P.params, cotangents([wanted]))
    assert distance(got, gradient) <= EXACT


def test_reno_s_gradient_is_plain_backpropagation_s_if_it_leaps_step_by_step():
    start = P.noise.detach().clone().requires_grad_()
    x = start
    for t in range(STEPS, 0, -1):
        x = x + h(t) * P.field(x, s(t))
    wanted = torch.autograd.grad(x, start, cotangents([x]))
    for way in WAYS:
        _, got = WAYS[way](reno(*range(STEPS - 1, 0, -1)), P, [P.noise], P.field)
        assert distance(got, wanted) <= EXACT, way


DRAWN = (
    LeapAlign(pairs="midpoint"),
    LeapAlign(pairs="midpoint-k"),
    LeapAlign(pairs="dirichlet"),
    LeapAlign(reward_at="prediction"),
    LeapAlign(straight=False),
    DRaFT1(),
    WholeTrajectory(),
    ReNO(),
    DRaFTK(2),
    DRaFTK(None),
    AlignProp(),
    FlowBPSparse(),
    FlowBPBridge(),
    FlowBPBridge(active=2, rescale=0.5),
    FlowBPLagrange(),
    SRPO(),
    SRPO(("real",), ("flat", "oil")),
    SRPO(("real",), (), inversion=False, step=2, window=(0.0, 1.0)),
)


@pytest.mark.parametrize("method", DRAWN, ids=str)
def test_every_draw_is_a_legal_plan_of_the_generator_alone(method):
    assert method.draw(25, seeded(3)) == method.draw(25, seeded(3))
    generator = seeded(1)
    for steps in (5, 6, 7, 25):
        for _ in range(20):
            assert method.draw(steps, generator).prepared(steps).steps == steps


def test_alignprop_draws_every_length_alike():
    generator = seeded(0)
    counts = Counter(len(AlignProp(4).draw(9, generator).nodes) // 2 for _ in range(400))
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 70  # of 100, five standard deviations of 6


def active_times(plan):
    return sorted(node.t for node in plan.nodes if node.op == "velocity")


def test_sparse_draws_late_times_more_often():
    """The authors' odds: (index + 1)^2, indices counted from the noise."""
    generator = seeded(0)
    counts = Counter(t for _ in range(400) for t in active_times(FlowBPSparse(1).draw(4, generator)))
    odds = {t: 400 * (5 - t) ** 2 / 30 for t in range(1, 5)}
    assert sum((counts[t] - odds[t]) ** 2 / odds[t] for t in odds) < 16.3  # chi-square of 3 degrees, p = 0.001


def test_bridge_trains_both_parts_in_proportion():
    generator, meets = seeded(0), Counter()
    for _ in range(300):
        plan = FlowBPBridge(active=5).draw(10, generator)
        (j,) = {node.t for node in plan.nodes if node.op == "connect"} - {0}
        times = active_times(plan)
        above = sum(t > j for t in times)
        assert j in times
        assert len(times) == 5
        assert above == max(min(max(round(5 * (10 - j) / 10), 1), 4), 5 - j)
        meets[j] += 1
    odds = {j: 300 * (10 - j) / 45 for j in range(1, 10)}  # the smaller one of a uniform pair
    assert sum((meets[j] - odds[j]) ** 2 / odds[j] for j in odds) < 26.1  # chi-square of 8 degrees, p = 0.001


def pair_of(plan):
    k, j = (n.t for n in plan.nodes if n.op == "velocity")
    return k, j


def test_dirichlet_splits_have_the_mean_of_their_shares():
    """The authors' A = 2.5 below j, B = 6 between, C = 2 above k."""
    generator = seeded(0)
    pairs = [pair_of(LeapAlign(pairs="dirichlet").draw(1000, generator)) for _ in range(300)]
    k, j = (sum(pair[i] for pair in pairs) / 300 for i in (0, 1))
    assert abs(j - 1000 * 2.5 / 10.5) < 40  # the standard error of the mean is 7
    assert abs(k - 1000 * 8.5 / 10.5) < 40
    for steps in (3, 4, 5, 25):
        for _ in range(50):
            k, j = pair_of(LeapAlign(pairs="dirichlet").draw(steps, generator))
            assert steps >= k > j >= 2


def test_midpoints_lie_half_way():
    """The authors' indices count from the noise: j = (k + T) // 2, and k = j // 2."""
    generator = seeded(0)
    seen = {
        pairs: {pair_of(LeapAlign(pairs=pairs).draw(9, generator)) for _ in range(200)}
        for pairs in ("midpoint", "midpoint-k")
    }
    assert seen["midpoint"] == {(k, 9 - ((9 - k) + 9) // 2) for k in range(2, 10)}
    assert seen["midpoint-k"] == {(9 - (9 - j) // 2, j) for j in range(1, 9)}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: draft_k(0),
        lambda: DRaFTK(9).draw(8),
        lambda: AlignProp(0).draw(8),
        lambda: AlignProp(9).draw(8),
        lambda: SRPO(step=7).draw(8),
        lambda: SRPO(step=0).draw(8),
        lambda: SRPO(("a",), ("b",), step=4).draw(8),
        lambda: SRPO(("a",), ("a",)).draw(8),
        lambda: SRPO(discount=(0.1, -1)).draw(8),
        lambda: SRPO(window=(0.9, 0.5)).draw(8),
        lambda: SRPO().draw(3),
        lambda: FlowBPSparse(9).draw(8),
        lambda: FlowBPBridge(1).draw(8),
        lambda: FlowBPLagrange().draw(2),
        lambda: FlowBPLagrange(sigmas=(1.0, 0.5, 0.0)).draw(8),
        lambda: whole_trajectory(0),
        lambda: LeapAlign(pairs="midpoint").draw(1),
        lambda: flowbp_sparse(5, ()),
        lambda: flowbp_sparse(4, {2}, [1.0, 0.5, 0.0]),
        lambda: flowbp_bridge(4, 2, {3}, sigmas=[1.0, 0.9, 0.5, 0.4, 0.2, 0.0]),
        lambda: flowbp_bridge(5, 3, {2}),
        lambda: leaps((3,), reward_at="x_0"),
        lambda: LeapAlign(pairs="midpoint", leaps=3).draw(8),
        lambda: LeapAlign(pairs="halves").draw(8),
        lambda: LeapAlign(pairs="midpoint", distance=0.5).draw(8),
    ],
)
def test_settings_that_make_no_plan_are_refused(wrong):
    with pytest.raises(PlanError, match=r"\d"):
        wrong()


@pytest.mark.parametrize("method", [*DRAWN, LeapAlign(leaps=3), DRTune(connected=True), ReFL(), DRaFTLV()], ids=str)
def test_the_public_proof_of_every_method(method):
    check_gradient(method, draws=1, steps=6)


@pytest.mark.parametrize("steps", ["6", 6.0, None, True, 0])
@pytest.mark.parametrize("method", [*DRAWN, LeapAlign(), DRTune(), ReFL(), DRaFTLV()], ids=str)
def test_what_is_no_number_of_steps_is_told(method, steps):
    with pytest.raises(PlanError, match="draw received steps="):
        method.draw(steps)
