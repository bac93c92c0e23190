"""The methods beyond Algorithm 1 against loops written from their descriptions: value, gradient and draws."""

import math
import sys

import pytest
import torch

from tests.builders.problems import WAYS, Problem, cotangents, distance, problem, seeded
from tests.tolerances import EXACT
from trajsurgery import (
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    draft_k,
    flowbp_bridge,
    flowbp_lagrange,
    flowbp_sparse,
    leaps,
    rollout,
    srpo,
)
from trajsurgery.methods import reno
from trajsurgery.testing import MLP

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


def connected_to(prediction, t):
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
        x = connected_to(x, stop)
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
        x = connected_to(x + sum(w * v for w, v in zip(ws, vs, strict=True)), stop)
    return x


def srpo_loop(k, j, eps=None):
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
        x = connected_to(x, to) if connected or to else x
        first = False
    return x


CASES = {
    "DRaFT-1": (draft_k(1), lambda: through_the_last(1)),
    "DRaFT-3": (draft_k(3), lambda: through_the_last(3)),
    "the whole trajectory": (draft_k(6), lambda: through_the_last(6)),
    "sparse": (flowbp_sparse(6, {6, 3, 2}), lambda: sparse({6, 3, 2})),
    "sparse at one": (flowbp_sparse(6, {4}), lambda: sparse({4})),
    "sparse, half made up for": (flowbp_sparse(6, {6, 1}, 0.5), lambda: sparse({6, 1}, 0.5)),
    "bridge": (flowbp_bridge(6, 3, {5, 1}, 0.3), lambda: bridge(3, {5, 1}, 0.3)),
    "bridge at 1": (flowbp_bridge(6, 1, {2}, 0.5), lambda: bridge(1, {2}, 0.5)),
    "bridge as it is": (flowbp_bridge(6, 4, {6, 2}, 0.3, 0.0), lambda: bridge(4, {6, 2}, 0.3, 0.0)),
    "lagrange": (flowbp_lagrange(6, 3), lambda: lagrange(6, 3, 0.1, 0.25)),
    "lagrange, long": (flowbp_lagrange(6, 5), lambda: lagrange(6, 5, 0.1, 0.25)),
    "lagrange next": (flowbp_lagrange(3, 2, 0.4, 0.5), lambda: lagrange(3, 2, 0.4, 0.5)),
    "lagrange at 1": (flowbp_lagrange(5, 1, 0.4, 0.2, 1.0), lambda: lagrange(5, 1, 0.4, 0.2, 1.0)),
    "lagrange as it is": (flowbp_lagrange(6, 2, 0.4, rescale=0), lambda: lagrange(6, 2, 0.4, 0.25, 0.0)),
    "srpo": (srpo(4, 2), lambda: srpo_loop(4, 2)),
    "srpo, a noise of its own": (srpo(4, 2, draw=0), lambda: srpo_loop(4, 2, drawn())),
    "srpo, inversion": (srpo(2, 5), lambda: srpo_loop(2, 5)),
    "reward at the prediction": (leaps((5, 2), 0.3, "prediction"), lambda: leaping((5, 2), 0.3, False, True)),
    "one leap": (leaps((4,)), lambda: leaping((4,), 1.0, True, True)),
    "three leaps": (leaps((5, 3, 2), 0.3), lambda: leaping((5, 3, 2), 0.3, True, True)),
    "nested only": (leaps((5, 2), 0.3, straight=False), lambda: leaping((5, 2), 0.3, True, False)),
    "nested only, three": (leaps((5, 3, 2), 0.3, straight=False), lambda: leaping((5, 3, 2), 0.3, True, False)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_gradient_and_value(case, way):
    plan, reference = CASES[case]
    P.trajectory.noises.clear()
    expected = reference()
    (out,), got = WAYS[way](plan, P, P.params, P.field)
    torch.testing.assert_close(out.detach(), expected.detach(), rtol=EXACT, atol=EXACT)
    gradient = torch.autograd.grad(expected, P.params, cotangents([expected]))
    assert distance(got, gradient) <= EXACT


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", [FlowBPSparse(), FlowBPBridge(), FlowBPLagrange()], ids=lambda m: type(m).__name__)
def test_flowbp_as_drawn_is_its_authors_loop_on_flux_s_shifted_times(method, seed, monkeypatch):
    """25 steps at 720 px (mu = 0.799), where even lengths give other gains."""
    even = torch.linspace(1, 1 / 25, 25, dtype=torch.float64)
    sigmas = torch.cat([math.exp(0.799) / (math.exp(0.799) + 1 / even - 1), even.new_zeros(1)])
    on_flux = Problem(P.field, P.noise, sigmas, rollout(P.field, P.noise, sigmas))
    for name, value in {"P": on_flux, "X": on_flux.trajectory, "V": on_flux.trajectory.velocity, "STEPS": 25}.items():
        monkeypatch.setattr(sys.modules[__name__], name, value)
    plan = method.draw(25, seeded(seed))
    calls = {node.t for node in plan.nodes if node.op == "velocity"}
    starts = [node.x.t for node in plan.nodes if node.op == "advance"]
    (j,) = {node.t for node in plan.nodes if node.op == "connect"} - {0} or {0}
    looped = {
        "FlowBPSparse": lambda: sparse(calls),
        "FlowBPBridge": lambda: bridge(j, calls, 0.1),
        "FlowBPLagrange": lambda: lagrange(max(starts), j, 0.1, 0.25),
    }[type(method).__name__]()
    expected = torch.autograd.grad(looped, P.params, cotangents([looped]))
    for way in ("retain", "staged", "sample split"):
        assert distance(WAYS[way](plan, on_flux, P.params, P.field)[1], expected) <= EXACT * 10, way


def test_reno_with_single_steps_is_plain_backpropagation():
    start = P.noise.detach().clone().requires_grad_()
    x = start
    for t in range(STEPS, 0, -1):
        x = x + h(t) * P.field(x, s(t))
    expected = torch.autograd.grad(x, start, cotangents([x]))
    for way in WAYS:
        _, got = WAYS[way](reno(*range(STEPS - 1, 0, -1)), P, [P.noise], P.field)
        assert distance(got, expected) <= EXACT, way
