"""The rules of single nodes: one table, each with an id, its demand, a predicate and the repair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trajsurgery.plans import nodes
from trajsurgery.plans.expression import START, Node, walk
from trajsurgery.plans.nodes import Advance, Discount, Leap, Noise, Recorded, Recover, Renoise, Scale, Velocity
from trajsurgery.plans.step_gain import StepGain

QUADRATURES = ("lagrange", "adams-bashforth", "euler")
Predicate = Callable[[Any, int | None], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """`broken(node, steps)` yields what was received wherever the node breaks the rule; `steps` is T, if known."""

    id: str
    on: tuple[type[Node], ...]
    demand: str
    broken: Predicate
    repair: str


def _bound(t: object, steps: int | None) -> int | None:
    """The number a time stands for, as far as it is known."""
    if t == START:
        return steps
    return t if isinstance(t, int) else None


def _times(node: Node) -> Iterator[object]:
    settings = node.settings()
    yield from (settings[name] for name in ("time", "to") if name in settings)
    if isinstance(settings.get("a"), StepGain):
        yield from settings["a"].times


def _time_type(node: Node, steps: int | None) -> Iterator[str]:
    for t in _times(node):
        if isinstance(t, bool) or not (isinstance(t, int) or (isinstance(t, str) and t.isidentifier())):
            yield f"the time {t!r}"


def _time_range(node: Node, steps: int | None) -> Iterator[str]:
    for t in _times(node):
        if isinstance(t, int) and (t < 0 or (steps is not None and t > steps)):
            yield f"the time {t}, of {'T' if steps is None else steps} steps"


def _falling(node: Leap | Advance, steps: int | None) -> Iterator[str]:
    start, to = _bound(node.x.t, steps), _bound(node.to, steps)
    rises = isinstance(node, Leap) and isinstance(node.x, Renoise)  # no latent of the rollout: SRPO's inversion
    if start is not None and to is not None and start >= 0 and (to == start or (to > start and not rises)):
        yield f"a {node.op} from t = {start} to t = {to}"
    elif start is None and node.to == node.x.t:  # a name that is not bound yet
        yield f"a {node.op} from t = {node.x.t} to itself"


def _velocity_time(node: Leap, steps: int | None) -> Iterator[str]:
    mine, other = _bound(node.x.t, steps), _bound(node.v.t, steps)
    if mine is not None and other is not None and mine != other:
        yield f"a latent at t = {mine} with a velocity at t = {other}"


def _factor_type(node: Discount | Scale, steps: int | None) -> Iterator[str]:
    if isinstance(node.a, str):
        if not node.a.isidentifier() or node.a == START:
            yield f"the factor {node.a!r}"
    elif isinstance(node.a, StepGain) and isinstance(node, Scale):
        return
    elif isinstance(node.a, bool) or not isinstance(node.a, int | float):
        yield f"the factor {node.a!r}"


def _number(is_wrong: Callable[[float], bool], received: str) -> Predicate:
    """A predicate on factors that are numbers."""

    def broken(node: Discount | Scale, steps: int | None) -> Iterator[str]:
        if isinstance(node.a, int | float) and not isinstance(node.a, bool) and is_wrong(node.a):
            yield received.format(float(node.a))

    return broken


def _kinds(node: Node, steps: int | None) -> Iterator[str]:
    for i, parent in enumerate(node.parents):
        takes_latent = i == 0 and "x" in node.inputs
        if not isinstance(parent, nodes.LatentNode if takes_latent else nodes.VelocityNode):
            yield f"{node.op} of a {'velocity' if takes_latent else 'latent'}"


def _field_name(node: Velocity, steps: int | None) -> Iterator[str]:
    if not (node.field is None or isinstance(node.field, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield f"the field {node.field!r}"


def _renoise_start(node: Renoise, steps: int | None) -> Iterator[str]:
    start = _bound(node.x.t, steps)
    if start is not None and start > 0:
        yield f"renoise from t = {start}"


def _at_zero(received: str, time: Callable[[Any], Any]) -> Predicate:
    """A predicate on nodes one of whose times may not be 0."""

    def broken(node: Node, steps: int | None) -> Iterator[str]:
        if time(node) == 0:
            yield f"{node.op} {received} t = 0"

    return broken


def _draw(node: Renoise | Recover, steps: int | None) -> Iterator[str]:
    d = node.draw
    if d != "rollout" and (isinstance(d, bool) or not isinstance(d, int) or d < 0):
        yield f"draw={d!r}"


def renoised(node: Recover) -> set[Any]:
    """The times to which the samples with this draw that the node descends from were renoised."""
    return {up.to for up in walk([node]) if isinstance(up, Renoise) and up.draw == node.draw}


def _recover_draw(node: Recover, steps: int | None) -> Iterator[str]:
    if node.draw != "rollout" and len(renoised(node)) > 1:
        yield f"recover(draw={node.draw!r}) below samples renoised to t = {sorted(map(str, renoised(node)))}"


def _noise_time(node: Noise, steps: int | None) -> Iterator[str]:
    if node.time != START and steps is not None and node.time != steps and isinstance(node.time, int):
        yield f"noise at t = {node.time} of T = {steps}"


def _quadrature(node: Advance, steps: int | None) -> Iterator[str]:
    if node.rule not in QUADRATURES:
        yield f"rule={node.rule!r}"


def _supports(node: Advance, steps: int | None) -> Iterator[str]:
    times = [_bound(v.t, steps) if _bound(v.t, steps) is not None else v.t for v in node.velocities]
    start, to = _bound(node.x.t, steps), _bound(node.to, steps)
    if not times:
        yield "no velocity"
    if len(set(times)) < len(times):
        yield f"velocities at t = {times}: one time twice"
    known = [t for t in times if isinstance(t, int)]
    if start is None or len(known) < len(times) or not times:
        return
    if node.rule != "lagrange" and start not in known:
        yield f"velocities at t = {known}, none at the latent's t = {start}"
    if node.rule == "adams-bashforth" and min(known) < start:
        yield f"velocities at t = {known}, some below the latent's t = {start}"
    if node.rule == "euler" and to is not None and not all(to < t <= start for t in known):
        yield f"velocities at t = {known}, some outside {start}..{to + 1}"


RULES: dict[str, Rule] = {
    rule.id: rule
    for rule in (
        Rule("kinds", (Node,), "latents and velocities stand where they are asked for", _kinds,
             "Call .velocity() on a latent to get a velocity, .leap(to) to get a latent."),
        Rule("time-type", (Node,), "a time is an int or a name", _time_type,
             "Give a step index 0..T, or an identifier to bind later with plan.at(name=...)."),
        Rule("time-range", (Node,), "times lie in 0..T", _time_range,
             "T is the sampler's number of steps (noise), 0 the image: lower the time, or run with more steps."),
        Rule("model-time", (Velocity, Recorded), "the model is called at 1..T", _at_zero("at", lambda node: node.t),
             "The sampler never calls the model at t = 0; use a velocity at a later time."),
        Rule("falling", (Leap, Advance), "time falls along every leap and advance", _falling,
             "Leap to a smaller t, or swap the two times."),
        Rule("velocity-time", (Leap,), "an explicit velocity sits at its latent's t", _velocity_time,
             "Take the velocity at the latent's own time, or use advance(to, [velocities]) for several times."),
        Rule("factor-type", (Discount, Scale), "a factor is a number or a name", _factor_type,
             "Give a float, or an identifier other than \"T\" to bind later with plan.at(name=...)."),
        Rule("finite", (Discount, Scale), "factors are finite",
             _number(lambda a: not math.isfinite(a), "the factor {}"), "Give a finite number."),
        Rule("discount-range", (Discount,), "a discount lies in [0, 1]",
             _number(lambda a: -math.inf < a < 0 or 1 < a < math.inf, "discount({})"),
             "Scale a velocity instead (v.scale(a)) if its gradient is to grow; use detach() for 0."),
        Rule("scale-range", (Scale,), "a scale is >= 0", _number(lambda a: -math.inf < a < 0, "scale({})"),
             "A negative scale would climb down the reward: change the sign of the loss instead."),
        Rule("field-name", (Velocity,), "a field is named by a string", _field_name,
             "Name one of the entries of the mapping of fields that the plan is run with, or leave it out."),
        Rule("renoise-start", (Renoise,), "renoise starts at t = 0", _renoise_start,
             "Renoise the image: latent(0).renoise(to), or leap(0) first."),
        Rule("renoise-to", (Renoise,), "renoise goes to a t in 1..T", _at_zero("to", lambda node: node.to),
             "Give a later time."),
        Rule("recover-start", (Recover,), "recover starts at a t in 1..T", _at_zero("from", lambda node: node.x.t),
             "The latent is an image already: drop the recover."),
        Rule("draw", (Renoise, Recover), 'a draw is an int >= 0 or "rollout"', _draw,
             'Number the noises 0, 1, ..., or name the rollout\'s own with draw="rollout".'),
        Rule("recover-draw", (Recover,), "recover removes one noise", _recover_draw,
             "Give the renoised samples different draws, and recover the one that you mean."),
        Rule("noise-time", (Noise,), "noise() is the rollout's x_T", _noise_time, "Use latent(t) for another time."),
        Rule("quadrature", (Advance,), f"an advance's rule is one of {', '.join(QUADRATURES)}", _quadrature,
             "Name one of them; lagrange takes velocities at any times."),
        Rule("supports", (Advance,), "an advance's velocities suit its rule", _supports,
             "Times are distinct; one is at the latent's t unless the rule is lagrange; adams-bashforth looks back (t "
             "at or above the latent's), euler looks ahead (t above the landing)."),
    )
}  # fmt: skip
