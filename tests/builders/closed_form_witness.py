"""The closed form evaluated by an independent witness: term by term, with torch.func.vjp of single model calls.

It takes from the library only the list of terms (coefficient and calls) and the recorded latents; the values of
unrecorded latents are computed here by plain formulas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from trajsurgery import Plan, Trajectory
from trajsurgery.plans.nodes import Node, Noise, walk


class Witness:
    """Gradients of a plan on a trajectory, from its closed form.

    Args:
        fields: modules by name; they share nothing with each other, the first one's parameters come first.
    """

    def __init__(self, plan: Plan, trajectory: Trajectory, fields: dict[str | None, nn.Module]) -> None:
        self.plan, self.trajectory, self.fields = plan, trajectory, fields
        self.values: dict[Node, Tensor] = {}
        self.pulls: dict[Node, Any] = {}
        for node in walk(plan.outputs):
            self.values[node] = self.value(node).detach()

    def time(self, t: Any) -> int:
        return self.trajectory.steps if t == "T" else int(t)

    def sigma(self, t: Any) -> Tensor:
        return self.trajectory.sigmas[self.trajectory.steps - self.time(t)]

    def value(self, node: Node) -> Tensor:
        """The node's value by the definition of its primitive."""
        path, of = self.trajectory.interpolant, [self.values[parent] for parent in node.parents]
        match node.op:
            case "latent" | "noise" | "connect":
                return self.trajectory.latents[self.time(node.t)]
            case "recorded":
                return self.trajectory.velocities[self.time(node.t)]
            case "velocity":
                with torch.no_grad():
                    return self.fields[node.field](of[0], self.sigma(node.t))
            case "leap":
                k, j = self.sigma(node.x.t), self.sigma(node.to)
                image, noise = split(path, of[0], of[1], k)
                return path.alpha(j, torch) * image + path.beta(j, torch) * noise
            case "advance":
                times = [float(self.sigma(v.t)) for v in node.velocities]
                ws = quadrature(node.rule, times, float(self.sigma(node.x.t)), float(self.sigma(node.to)))
                return of[0] + sum(w * v for w, v in zip(ws, of[1:], strict=True))
            case "renoise":
                to = self.sigma(node.to)
                return path.alpha(to, torch) * of[0] + path.beta(to, torch) * self.eps(node.draw, node.to)
            case "recover":
                t = self.sigma(node.x.t)
                drawn = {up.to for up in walk([node]) if up.op == "renoise" and up.draw == node.draw}
                eps = self.eps(node.draw, drawn.pop() if drawn else node.x.t)
                return (of[0] - path.beta(t, torch) * eps) / path.alpha(t, torch)
        return of[0]  # discount, scale, detach: the same value

    def eps(self, draw: Any, to: Any) -> Tensor:
        return (
            self.trajectory.latents[self.trajectory.steps]
            if draw == "rollout"
            else self.trajectory.noises[draw, self.time(to)]
        )

    def pull(self, call: Any, cotangent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(dv/dtheta)^T c and (dv/dx)^T c of one call."""
        if call not in self.pulls:
            field, sigma = self.fields[call.field], self.sigma(call.t)
            weights = {name: p.detach() for name, p in field.named_parameters()}
            run = lambda theta, x: functional_call(field, theta, (x, sigma))  # noqa: E731
            self.pulls[call] = vjp(run, weights, self.values[call.x])[1]
        return self.pulls[call](cotangent)

    def gradient(self, terms: Sequence[Any], coefficients: Sequence[float], cs: Sequence[Tensor]) -> list[Tensor]:
        """d<outputs, cs>/d(parameters of all fields, x_T): the sum over the terms."""
        total = {name: {n: torch.zeros_like(p) for n, p in f.named_parameters()} for name, f in self.fields.items()}
        start = torch.zeros_like(self.trajectory.latents[self.trajectory.steps])
        for term, coefficient in zip(terms, coefficients, strict=True):
            c = coefficient * cs[term.output]
            for call in term.calls[:-1]:
                c = self.pull(call, c)[1]
            source = term.calls[-1]
            if isinstance(source, Noise):
                start = start + c
                continue
            for name, g in self.pull(source, c)[0].items():
                total[source.field][name] = total[source.field][name] + g
        return [*(g for field in total.values() for g in field.values()), start]


def split(path: Any, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The image and the noise that x = alpha x_0 + beta x_1 and v = alpha' x_0 + beta' x_1 are made of."""
    left = torch.stack([share + 0.0 * t for share in path.shares(t, torch)]).view(2, 2)
    inverse = torch.linalg.inv(left)
    return inverse[0, 0] * x + inverse[0, 1] * v, inverse[1, 0] * x + inverse[1, 1] * v


def quadrature(rule: str, supports: Sequence[float], start: float, to: float) -> list[float]:
    """The weights of an advance by definition: Gauss-Legendre on the Lagrange polynomials, or each velocity held."""
    if rule == "euler":
        order = sorted(range(len(supports)), key=lambda i: abs(supports[i] - start))
        ends = [supports[i] for i in order[1:]] + [to]
        held = {i: end - supports[i] for i, end in zip(order, ends, strict=True)}
        return [held[i] for i in range(len(supports))]
    import numpy as np

    nodes, ws = np.polynomial.legendre.leggauss(len(supports) + 1)
    at = (to - start) / 2 * nodes + (to + start) / 2
    result = []
    for i, s in enumerate(supports):
        basis = np.prod([(at - m) / (s - m) for n, m in enumerate(supports) if n != i] or [np.ones_like(at)], axis=0)
        result.append(float((to - start) / 2 * (ws * basis).sum()))
    return result
