"""Hypothesis strategies for plans, fields, trajectories and methods. `MOVES` has an entry for every primitive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from trajsurgery import methods as zoo
from trajsurgery.plans.graph import passes_gradient, trained
from trajsurgery.plans.interpolants import Interpolant, Polynomial, RectifiedFlow, Trigonometric
from trajsurgery.plans.nodes import START, LatentNode, Node, Noise, Recover, Velocity, VelocityNode, walk
from trajsurgery.plans.plan import Plan, latent, noise, recorded
from trajsurgery.plans.rules import QUADRATURES, renoised
from trajsurgery.plans.step_gain import StepGain
from trajsurgery.surgery.api import rollout
from trajsurgery.surgery.parameters import Field
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.testing.proof_cases import Method
from trajsurgery.testing.velocity_fields import MLP, Gaussian

__all__ = ["INTERPOLANTS", "MOVES", "factors", "fields", "methods", "plans", "sigmas", "trajectories"]

INTERPOLANTS: tuple[Interpolant, ...] = (RectifiedFlow(), Trigonometric(), Polynomial())


@dataclass
class Growth:
    """A plan while it is drawn: nodes that the next move can build on, newest first."""

    steps: int
    fields: tuple[str, ...]
    latents: list[LatentNode]

    def t(self, node: Node) -> int:
        """Return the node's time as a number."""
        return self.steps if node.t == START else int(node.t)

    def latent(self, draw: st.DrawFn, lowest: int = 0, highest: int | None = None) -> LatentNode:
        """Return one of the newest latents at a time in `lowest`..`highest`, or a fresh one."""
        top = self.steps if highest is None else highest
        candidates = [x for x in self.latents if lowest <= self.t(x) <= top][:4]
        if not candidates:
            return latent(draw(st.integers(lowest, top)))
        return draw(st.sampled_from([*candidates[:1], *candidates]))

    def velocities(self, t: int) -> list[VelocityNode]:
        """Return the velocities at that time."""
        return [v for v in walk(self.latents) if isinstance(v, VelocityNode) and self.t(v) == t]


Move = Callable[[st.DrawFn, Growth], LatentNode | None]


def _leap(draw: st.DrawFn, grown: Growth) -> LatentNode:
    x = grown.latent(draw, 1)
    return x.leap(draw(st.integers(0, grown.t(x) - 1)), discount=draw(st.none() | factors()))


def _by(change: Callable[[st.DrawFn, Growth, LatentNode], VelocityNode]) -> Move:
    """Return a leap by a velocity made from the leap's start."""

    def move(draw: st.DrawFn, grown: Growth) -> LatentNode:
        x = grown.latent(draw, 1)
        return x.leap(draw(st.integers(0, grown.t(x) - 1)), velocity=change(draw, grown, x))

    return move


def _some_velocity(draw: st.DrawFn, grown: Growth, x: LatentNode) -> VelocityNode:
    return draw(st.sampled_from([x.velocity(), x.detach().velocity(), *grown.velocities(grown.t(x))]))


def _named(draw: st.DrawFn, grown: Growth, x: LatentNode) -> VelocityNode:
    field = draw(st.sampled_from((None, *grown.fields)))
    return x.velocity(field) if field else _some_velocity(draw, grown, x)


def _advance(draw: st.DrawFn, grown: Growth) -> LatentNode:
    x = grown.latent(draw, 1)
    start = grown.t(x)
    to = draw(st.integers(0, start - 1))
    rule = draw(st.sampled_from(QUADRATURES))
    reach = {"lagrange": (1, grown.steps), "adams-bashforth": (start, grown.steps), "euler": (to + 1, start)}[rule]
    free = [t for t in range(reach[0], reach[1] + 1) if t != start]
    others = draw(st.lists(st.sampled_from(free), unique=True, max_size=2)) if free else []
    supports = [x.velocity().scale(draw(factors(2.0)))]
    supports += [draw(st.sampled_from([latent(t).velocity(), *grown.velocities(t), recorded(t)])) for t in others]
    return x.advance(to, supports, rule)


def _recover(draw: st.DrawFn, grown: Growth) -> LatentNode | None:
    if grown.steps == 1:  # the image's share is 0 at T
        return None
    node = Recover(grown.latent(draw, 1, grown.steps - 1), draw(_draws))
    return node if node.draw == "rollout" or len(renoised(node)) < 2 else None


_draws = st.sampled_from((0, 1, "rollout"))

MOVES: dict[str, Move] = {
    "leap": _leap,
    "latent": lambda draw, grown: latent(draw(st.integers(0, grown.steps))),
    "connect": lambda draw, grown: grown.latent(draw).connect(),
    "discount": lambda draw, grown: grown.latent(draw).discount(draw(factors())),
    "detach": lambda draw, grown: grown.latent(draw).detach(),
    "velocity": _by(_named),
    "recorded": _by(lambda draw, grown, x: recorded(x.t)),
    "scale": _by(lambda draw, grown, x: _some_velocity(draw, grown, x).scale(draw(factors(2.0) | gains(grown.steps)))),
    "detach_velocity": _by(lambda draw, grown, x: _some_velocity(draw, grown, x).detach()),
    "renoise": lambda draw, grown: grown.latent(draw, 0, 0).renoise(draw(st.integers(1, grown.steps)), draw(_draws)),
    "recover": _recover,
    "advance": _advance,
    "noise": lambda draw, grown: noise(),
}
"""How a plan grows: for each primitive a latent made with it, or None where it does not apply."""

_USUAL = ("leap", "leap", "connect", "velocity", *MOVES)


def factors(largest: float = 1.0) -> st.SearchStrategy[float]:
    """Factors of discount and scale: 0, 1 and values between, up to `largest`."""
    return st.sampled_from((1.0, 0.0, 0.5, largest)) | st.floats(0, largest, width=16, allow_subnormal=False)


@st.composite
def gains(draw: st.DrawFn, steps: int) -> StepGain:
    """Gains over any times of a sampler of `steps` steps."""
    *times, to = sorted(draw(st.sets(st.integers(0, steps), min_size=2)), reverse=True)
    active = draw(st.sets(st.sampled_from(times), min_size=1))
    return StepGain(tuple(times), tuple(active), to, rescale=draw(factors()))


@st.composite
def plans(
    draw: st.DrawFn,
    steps: int,
    size: int = 10,
    outputs: int = 2,
    fields: Sequence[str] = (),
    ops: Sequence[str] = (),
    calls: int = 12,
) -> Plan:
    """Legal plans for a sampler of `steps` steps. They shrink to `latent(t).leap(0)`.

    A plan may hold `noise()`: run it on a trajectory whose noise requires a gradient.

    Args:
        size: the most moves that build the plan; a move adds a latent and what it is made of.
        outputs: the most outputs.
        fields: names of fields that calls may use beside the default one.
        ops: the primitives to grow by; by default all.
        calls: half of the plans continue until an output's gradient reaches a drawn number of calls, at most this many
            (not if `ops` are given).
    """
    first = latent(draw(st.integers(1, steps)))
    grown = Growth(steps, tuple(fields), [first])
    for _ in range(draw(st.integers(1, size))):
        made = MOVES[draw(st.sampled_from(tuple(ops) or _USUAL))](draw, grown)
        grown.latents[:0] = [] if made is None else [made]
    reached = {x: len(trained([x])) for x in grown.latents}
    ends = sorted((x for x in reached if reached[x]), key=lambda x: -reached[x])[:3] or [first.leap(0)]
    if not ops and draw(st.booleans()):
        ends[0] = _longer(draw, grown, ends[0], draw(st.integers(1, calls)))
    picked = draw(st.lists(st.sampled_from(ends), unique=True, min_size=1, max_size=outputs))
    return Plan(*picked, steps=draw(st.sampled_from((None, steps))))


def _longer(draw: st.DrawFn, grown: Growth, x: LatentNode, calls: int) -> LatentNode:
    """Lead the latent on by leaps (over renoised images, once at 0) until its gradient reaches that many calls."""
    paths = _paths(x)
    for _ in range(calls - len(trained([x]))):
        if grown.t(x) == 0:
            x = x.renoise(draw(st.integers(1, grown.steps)), draw(_draws))
        # where straight path and call both go on, the paths double
        start = draw(st.sampled_from(("plain", "detach", "discount") if paths < _MOST_PATHS else ("detach",)))
        paths = paths + 1 if start == "detach" else 2 * paths + 1
        y = x.discount(draw(factors())) if start == "discount" else x.detach() if start == "detach" else x
        x = x.leap(draw(st.integers(0, grown.t(x) - 1)), velocity=y.velocity())
        x = x.connect() if draw(st.booleans()) else x
    return x


def _paths(end: Node) -> int:
    """Count the paths from calls to the node; its closed form has at most as many terms."""
    counts: dict[Node, int] = {}
    for node in walk([end]):
        up = sum(counts[parent] for parent in node.parents) if passes_gradient(node) else 0
        counts[node] = up + isinstance(node, Velocity | Noise)
    return counts[end]


_MOST_PATHS = 30


@st.composite
def sigmas(draw: st.DrawFn, steps: int) -> list[float]:
    """[steps + 1] times from 1 down to 0, no two closer than a fifth of the even step."""
    widths = draw(st.lists(st.integers(2, 10), min_size=steps, max_size=steps))
    return [1 - sum(widths[:i]) / sum(widths) for i in range(steps)] + [0.0]


@st.composite
def fields(draw: st.DrawFn, dim: int = 4, interpolant: Interpolant | None = None) -> MLP | Gaussian:
    """Trainable velocity fields on [batch, dim] in float64: random MLPs, and Gaussians with their exact velocity."""
    seed = draw(st.integers(0, 2**16))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        mean, spread = torch.randn(2, dim, generator=generator, dtype=torch.float64)
        return Gaussian(mean, 0.3 + spread.abs(), interpolant)
    return MLP(dim, draw(st.sampled_from((8, 3))), seed)


@st.composite
def trajectories(
    draw: st.DrawFn,
    field: Field | None = None,
    steps: int | None = None,
    shape: Sequence[int] = (4,),
    interpolants: Sequence[Interpolant] = (),
) -> Trajectory:
    """Rollouts of a field in float64 on random times, batches of 1 to 3. Their noise requires a gradient.

    Args:
        field: by default `MLP(shape[-1])`.
        steps: by default 1 to 8.
        shape: of a latent, without the batch.
        interpolants: what leaps may assume; by default rectified flow.
    """
    times = draw(sigmas(draw(st.integers(1, 8)) if steps is None else steps))
    batch = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    start = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    interpolant = draw(st.sampled_from(tuple(interpolants) or INTERPOLANTS[:1]))
    return rollout(field or MLP(shape[-1]), start, torch.tensor(times, dtype=torch.float64), interpolant)


@st.composite
def methods(draw: st.DrawFn, steps: int = 8) -> Method:
    """Methods whose `draw(steps)` succeeds."""
    some, factor = st.integers(1, steps), factors()
    everywhere, few = st.just((0.0, 1.0)), st.integers(1, min(4, steps))
    made: list[tuple[int, st.SearchStrategy[Method]]] = [  # after the fewest steps that it can be drawn for
        (1, st.builds(zoo.LeapAlign, factor, leaps=st.integers(1, min(3, steps)), straight=st.booleans())),
        (1, st.builds(zoo.ReFL, some)),
        (1, st.builds(zoo.DRTune, some, some, st.booleans())),
        (1, st.builds(zoo.DRaFTLV, st.integers(0, 2))),
        (1, st.builds(zoo.DRaFT1)),
        (1, st.builds(zoo.DRaFTK, few)),
        (1, st.builds(zoo.AlignProp, few)),
        (1, st.builds(zoo.FlowBPSparse, some, rescale=factor)),
        (2, st.builds(zoo.LeapAlign, factor, pairs=st.sampled_from(("midpoint", "midpoint-k")))),
        (2, st.builds(zoo.FlowBPBridge, st.integers(2, steps), alpha=factor, rescale=factor)),
        (3, st.builds(zoo.LeapAlign, factor, pairs=st.just("dirichlet"))),
        (3, st.builds(zoo.FlowBPLagrange, factor, factor, rescale=factor)),
        (3, st.builds(zoo.SRPO, step=st.integers(1, steps - 2), window=everywhere)),
        (4, st.builds(zoo.SRPO, st.just(("real",)), step=st.integers(1, (steps - 2) // 2), window=everywhere)),
    ]
    return draw(st.one_of([strategy for fewest, strategy in made if steps >= fewest]))
