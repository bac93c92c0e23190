"""Draws of the methods: legal plans from the generator only, distributed as in the papers; bad settings are refused."""

from collections import Counter

import pytest

from tests.builders.problems import seeded
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
    flowbp_sparse,
    leaps,
    whole_trajectory,
)
from trajsurgery.testing import check_gradient

STEPS = 6


DRAWN = (
    LeapAlign(pairs="midpoint"),
    LeapAlign(pairs="midpoint-k"),
    LeapAlign(pairs="dirichlet"),
    LeapAlign(reward_at="prediction"),
    LeapAlign(straight=False),
    LeapAlign(leaps=1),
    LeapAlign(alpha=0.0),
    LeapAlign(window=(0.0, 0.5)),
    LeapAlign(distance=0.5),
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
    SRPO(rollout_guidance=1.0),
    SRPO(("real",), (), inversion=False, step=2, window=(0.0, 1.0)),
)


@pytest.mark.parametrize("method", DRAWN, ids=str)
def test_draws_are_legal_plans_and_depend_on_the_generator_only(method):
    assert method.draw(25, seeded(3)) == method.draw(25, seeded(3))
    generator = seeded(1)
    for steps in (5, 6, 7, 25):
        for _ in range(20):
            assert method.draw(steps, generator).prepared(steps).steps == steps


def test_alignprop_draws_lengths_uniformly():
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
    generator, counts = seeded(0), Counter()
    for _ in range(300):
        plan = FlowBPBridge(active=5).draw(10, generator)
        (j,) = {node.t for node in plan.nodes if node.op == "connect"} - {0}
        times = active_times(plan)
        above = sum(t > j for t in times)
        assert j in times
        assert len(times) == 5
        assert above == max(min(max(round(5 * (10 - j) / 10), 1), 4), 5 - j)
        counts[j] += 1
    odds = {j: 300 * (10 - j) / 45 for j in range(1, 10)}  # the smaller one of a uniform pair
    assert sum((counts[j] - odds[j]) ** 2 / odds[j] for j in odds) < 26.1  # chi-square of 8 degrees, p = 0.001


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
        lambda: whole_trajectory(0),
        lambda: LeapAlign(pairs="midpoint").draw(1),
        lambda: flowbp_sparse(5, ()),
        lambda: flowbp_sparse(5, (6,)),
        lambda: flowbp_sparse(5, (3,), -0.5),
        lambda: flowbp_bridge(5, 3, {2}),
        lambda: leaps((3,), reward_at="x_0"),
        lambda: LeapAlign(pairs="midpoint", leaps=3).draw(8),
        lambda: LeapAlign(pairs="halves").draw(8),
        lambda: LeapAlign(leaps=-1).draw(8),
        lambda: LeapAlign(pairs="midpoint", distance=0.5).draw(8),
    ],
)
def test_settings_that_make_no_plan_are_refused(wrong):
    with pytest.raises(PlanError, match=r"\d"):
        wrong()


@pytest.mark.parametrize("method", [*DRAWN, LeapAlign(leaps=3), DRTune(connected=True), ReFL(), DRaFTLV()], ids=str)
def test_check_gradient_proves_every_method(method):
    check_gradient(method, draws=1, steps=6)


@pytest.mark.parametrize("steps", ["6", 6.0, None, True, 0])
@pytest.mark.parametrize("method", [*DRAWN, LeapAlign(), DRTune(), ReFL(), DRaFTLV()], ids=str)
def test_what_is_no_number_of_steps_is_refused(method, steps):
    with pytest.raises(PlanError, match="draw received steps="):
        method.draw(steps)
