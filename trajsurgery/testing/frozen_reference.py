"""The frozen reference: the plan as a smooth function of the parameters, whose derivative is the plan's gradient.

The plan is run once. Then detach becomes the recorded value, a discount y becomes y_0 + a (y - y_0), and a connector
becomes x_t + (y - y_0), with constants from that run. Finite differences can differentiate the result without autograd.
Nothing here is shared with the execution of plans.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor

from trajsurgery.plans import nodes
from trajsurgery.plans.nodes import Node, walk
from trajsurgery.plans.step_gain import StepGain
from trajsurgery.testing.proof_cases import Case

STENCIL = ((1, 4 / 5), (2, -1 / 5), (3, 4 / 105), (4, -1 / 280))
"""Central differences of eighth order."""


class FrozenPlan:
    """A case's plan with the stopped values of one run as constants."""

    def __init__(self, case: Case) -> None:
        self.case, self.trajectory = case, case.trajectory
        with torch.no_grad():
            self.constants: dict[Node, Tensor] = {}
            self.constants = self.run(None)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The values of the plan's outputs, [batch, *latent]."""
        return tuple(self.constants[output] for output in self.case.plan.outputs)

    def derivative(self, direction: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return d(outputs) along a direction of `case.wrt`, by finite differences."""
        leaves, params, outputs = self.case.wrt, self.case.params, self.case.plan.outputs
        step = torch.finfo(self.outputs[0].dtype).eps ** (1 / 9) / 32
        derivatives = [torch.zeros_like(output) for output in self.outputs]
        for (i, weight), sign in product(STENCIL, (1, -1)):
            by = sign * i * step
            start = leaves[-1].detach() + by * direction[-1] if len(leaves) > len(params) else None
            with torch.no_grad(), _moved_parameters(params, direction, by):
                values = self.run(start)
            changes = [values[output] - self.constants[output] for output in outputs]
            derivatives = [d + sign * weight * change / step for d, change in zip(derivatives, changes, strict=True)]
        return tuple(derivatives)

    def run(self, start: Tensor | None) -> dict[Node, Tensor]:
        """Return every node's value with the current parameters."""
        of: dict[Node, Tensor] = {}
        for node in walk(self.case.plan.outputs):
            of[node] = self._value(node, of, start)
        return of

    def _value(self, node: Node, of: dict[Node, Tensor], start: Tensor | None) -> Tensor:
        """Return a node's value by its definition; in the first run constants are set to the values."""
        x: Any = self.trajectory  # whose times are ints: the case's plan is bound
        path, sigma = x.interpolant, x.sigma
        constant = {parent: self.constants.get(parent, of[parent]) for parent in node.parents}
        match node:
            case nodes.Latent():
                return x[node.t]
            case nodes.Noise():
                return x[node.t] if start is None else start
            case nodes.Recorded():
                return x.velocity(node.t)
            case nodes.Velocity():
                return self.case.fields[node.field](of[node.x], sigma(node.t))
            case nodes.Connect():
                return x[node.t] + (of[node.x] - constant[node.x])
            case nodes.Discount() | nodes.Scale():
                (y,) = node.parents
                return constant[y] + self._factor(node.a) * (of[y] - constant[y])
            case nodes.Detach() | nodes.DetachVelocity():
                return constant[node.parents[0]]
            case nodes.Leap():
                return straight(path, of[node.x], of[node.v], sigma(node.x.t), sigma(node.to))
            case nodes.Advance():
                times = [float(sigma(v.t)) for v in node.velocities]
                ws = quadrature(node.rule, times, float(sigma(node.x.t)), float(sigma(node.to)))
                return of[node.x] + sum(w * of[v] for w, v in zip(ws, node.velocities, strict=True))
            case nodes.Renoise():
                to = sigma(node.to)
                return path.alpha(to, torch) * of[node.x] + path.beta(to, torch) * x.noise(node.draw, node.to)
            case nodes.Recover():
                at = sigma(node.x.t)
                drawn = [up.to for up in walk([node]) if isinstance(up, nodes.Renoise) and up.draw == node.draw]
                eps = x.noise(node.draw, drawn[0] if drawn else node.x.t)
                return (of[node.x] - path.beta(at, torch) * eps) / path.alpha(at, torch)
            case _:
                raise AssertionError(node)

    def _factor(self, a: Any) -> float:
        if not isinstance(a, StepGain):
            return float(a)
        times = [float(self.trajectory.sigma(t)) for t in a.times]
        ws = quadrature(a.rule, times, times[0], float(self.trajectory.sigma(a.to)))
        carried = sum(abs(w) for t, w in zip(a.times, ws, strict=True) if t in a.active)
        return 1 - a.rescale + a.rescale * sum(map(abs, ws)) / carried


def straight(path: Any, x: Tensor, v: Tensor, k: Tensor, j: Tensor) -> Tensor:
    """Return x at j of the straight path alpha x_0 + beta x_1 that has value x and velocity v at k."""
    alpha, beta, da, db = path.shares(k, torch)
    determinant = alpha * db - beta * da
    image, noise = (db * x - beta * v) / determinant, (alpha * v - da * x) / determinant
    return path.alpha(j, torch) * image + path.beta(j, torch) * noise


def quadrature(rule: str, supports: Sequence[float], start: float, to: float) -> list[float]:
    """Return the weights of an advance: each velocity held, or those that integrate every power of sigma exactly."""
    if rule == "euler":
        order = sorted(range(len(supports)), key=lambda i: abs(supports[i] - start))
        ends = [*(supports[i] for i in order[1:]), to]
        held = {i: end - supports[i] for i, end in zip(order, ends, strict=True)}
        return [held[i] for i in range(len(supports))]
    powers = torch.arange(len(supports), dtype=torch.float64)[:, None]
    rows = (torch.tensor(supports, dtype=torch.float64) - start) ** powers
    areas = (to - start) ** (powers[:, 0] + 1) / (powers[:, 0] + 1)
    return torch.linalg.solve(rows, areas).tolist()


@contextmanager
def _moved_parameters(params: Sequence[Tensor], direction: Sequence[Tensor], by: float) -> Generator[None]:
    """Move the parameters in place, and restore them on exit."""
    originals = [p.detach().clone() for p in params]
    try:
        for p, d in zip(params, direction, strict=False):  # a direction of x_T may follow
            p.add_(d, alpha=by)
        yield
    finally:
        for p, before in zip(params, originals, strict=True):
            p.copy_(before)
