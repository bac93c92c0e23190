"""Find which term of the closed form has a wrong factor in a wrong gradient.

The terms of the closed form, and those that the plan stops, are evaluated one by one; least squares finds the factor of
each in the gradient at hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from trajsurgery.errors import PlanError
from trajsurgery.plans.graph import passes_gradient
from trajsurgery.plans.nodes import LatentNode, Node, Noise
from trajsurgery.plans.plan import Plan
from trajsurgery.testing.proof_cases import Case

Measure = Callable[[Sequence[tuple[Tensor, ...]], Sequence[tuple[Tensor, ...]]], Tensor]
"""(cotangents, directions) -> [cotangents, directions]: <direction, gradient for the cotangent>."""

STOP = "stop"
MOST_TERMS, SAME, EXPLAINED = 200, 1e-9, 1e-5


@dataclass
class Part:
    """Terms whose gradients have one direction on this field; usually a single term."""

    column: Tensor
    """The measured values of the first term, with factor 1."""
    terms: list[Any] = field(default_factory=list[Any])
    wanted: float = 0.0
    """Its factor in the closed form."""


def explain(case: Case, measure: Measure) -> str:
    """Return lines that name the terms with wrong factors in a measured gradient."""
    count = math.ceil(math.sqrt(4 * min(MOST_TERMS, _with_named_factors(case)[1].count))) + 2
    cotangents = [case.cotangents(seed) for seed in range(10, 10 + count)]
    directions = [case.direction(seed) for seed in range(50, 50 + count)]
    parts = _parts(case, cotangents, directions)
    missed = measure(cotangents, directions).double().flatten().cpu()
    missed = missed - sum((part.wanted * part.column for part in parts), torch.zeros_like(missed))
    off, left = _factors(parts, missed)
    lines = [_sentence(case, parts[i], off[i]) for i in off]
    if left > EXPLAINED:
        heading = f". The nearest, which leave {left:.0%} of the difference:" if lines else "."
        lines.insert(
            0, f"no factors of the terms explain it: a call at another input, or a field that changes{heading}"
        )
    return "\n".join(f"  {line}" for line in lines)


def _with_named_factors(case: Case) -> tuple[Plan, Any]:
    """Return the plan with its stops as a factor named `stop` and its other factors named, and its closed form."""
    called = {value: name for name, value in case.factors.items()}
    made: dict[Node, Any] = {}
    for node in case.plan.nodes:
        if node.parents and not passes_gradient(node):
            parent = made[node.parents[0]]
            made[node] = parent.discount(STOP) if isinstance(node, LatentNode) else parent.scale(STOP)
        else:
            made[node] = node.replace(made, lambda name, value: called.get(value, value) if name == "a" else value)
    try:
        plan = Plan(*(made[output] for output in case.plan.outputs), steps=case.plan.steps)
    except PlanError:
        plan = case.plan
    return plan, plan.gradient(interpolant=case.trajectory.interpolant, limit=MOST_TERMS)


def _parts(case: Case, cotangents: Sequence[Any], directions: Sequence[Any]) -> list[Part]:
    """Evaluate every term for the cotangents and directions, with stops open."""
    plan, symbolic = _with_named_factors(case)
    values = {name: value for name, value in {**case.factors, STOP: 1.0}.items() if name in plan.names}
    numeric = plan.at(**values).gradient(interpolant=case.trajectory.interpolant, limit=MOST_TERMS)
    listed = replace(numeric, count=len(numeric.terms))
    shown = symbolic if len(symbolic.terms) == len(numeric.terms) else numeric
    evaluations = [listed.evaluate(case.trajectory, case.fields, list(c), case.params).terms for c in cotangents]
    parts: list[Part] = []
    for i, term in enumerate(shown.terms):
        column = torch.stack([_inner(term, f[i], d) for f in evaluations for d in directions]).cpu()
        if float(column.norm()) > 0:
            _join(parts, Part(column, [replace(shown, terms=[term], count=1)], float(STOP not in _powers(term))))
    return parts


def _join(parts: list[Part], new: Part) -> None:
    """Add a part, or add its terms to a part of the same direction."""
    for part in parts:
        scale = float(part.column @ new.column / part.column.square().sum())
        if float((new.column - scale * part.column).norm()) <= SAME * float(new.column.norm()):
            part.wanted += scale * new.wanted
            part.terms += new.terms
            return
    parts.append(new)


def _inner(term: Any, gradient: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """Return <gradient of a term, direction>; for a term of `noise()`, the gradient of x_T, the last part."""
    of = direction[-1:] if isinstance(term.calls[-1], Noise) else direction[: len(gradient)]
    return sum(((a.double() * b.double()).sum() for a, b in zip(gradient, of, strict=True)), torch.zeros(()).double())


def _factors(parts: Sequence[Part], missed: Tensor) -> tuple[dict[int, float], float]:
    """Return the missing or surplus factor of each part, and the unexplained share; one part if one suffices."""
    size = float(missed.norm())
    if not parts or size == 0:
        return {}, 1.0
    units = torch.stack([part.column / part.column.norm() for part in parts], 1)
    nearest = int((units.T @ missed).abs().argmax())
    shares, left = torch.zeros(0), 1.0
    for chosen in ([nearest], [*range(len(parts))]):
        solved = torch.linalg.lstsq(units[:, chosen], missed[:, None], driver="gelsd").solution[:, 0]
        shares = missed.new_zeros(len(parts)).index_copy(0, torch.tensor(chosen), solved)
        left = float((units @ shares - missed).norm()) / size
        if left <= EXPLAINED:
            break
    wrong = [i for i, share in enumerate(shares.tolist()) if abs(share) > EXPLAINED * size]
    return {i: float(shares[i] / parts[i].column.norm()) for i in wrong}, left


def _sentence(case: Case, part: Part, off: float) -> str:
    """Return the sentence about one part."""
    same = [one for one in part.terms if STOP not in _powers(one.terms[0])] or part.terms
    texts = " and ".join(_term_text(case, one) for one in same)
    subject = _term(case, same[0]) if len(same) == 1 else f"the sum of the terms {texts}, which have one direction,"
    if abs(part.wanted) < EXPLAINED:
        return f"{subject} is there, {off:.6g} times, though the plan stops it (detach, or a factor 0)"
    return f"{subject} {_factor(case, _powers(same[0].terms[0]), 1 + off / part.wanted)}"


def _term(case: Case, one: Any) -> str:
    """Return a term's kind, text and times."""
    term = one.terms[0]
    kind = "single-step" if term.order == 0 else "nested" if term.order == 1 else f"{term.order} times nested"
    through = f", through the input at t = {', '.join(map(str, term.jacobians))}" if term.jacobians else ""
    return f"the {kind} term {_term_text(case, one)} (at t = {term.source}{through})"


def _term_text(case: Case, one: Any) -> str:
    """Return the term as the paper writes it, with the names that its times were bound to."""
    opened = replace(one.terms[0], coefficient=one.terms[0].coefficient.subs(STOP, 1))
    text = str(replace(one, terms=[opened])).splitlines()[opened.output].split(" = ", 1)[1]
    for name, t in case.times.items():
        text = re.sub(rf"\bsigma_{t}\b", name, re.sub(rf"(?<=x)_{t}\b", f"_{name}", text))
    return text


def _factor(case: Case, powers: dict[str, int], factor: float) -> str:
    """Describe a factor: missing, wrong sign, twice, a power of a discount, a time."""
    if abs(factor) < EXPLAINED:
        return "is missing (factor 0)"
    near = (text for value, text in _usual_mistakes(case, powers) if math.isclose(factor, value, rel_tol=EXPLAINED))
    return next(near, f"is off by a factor {factor:.6g}")


def _usual_mistakes(case: Case, powers: dict[str, int]) -> Iterator[tuple[float, str]]:
    """Yield the factors that a term has after a usual mistake, with what to say of each."""
    yield -1, "has the wrong sign (factor -1)"
    for name, value in case.factors.items():
        has = powers.get(name, 0)
        for power, sign in product((1, -1, 2, -2), (1, -1)):
            factor, minus = sign * value**power, "" if sign == 1 else "-"
            carries = f"carries {_power(name, has + power)} instead of {_power(name, has)}"
            text = f"{carries}: a factor {factor:.6g} = {minus}{_power(name, power)}"
            yield factor, text if sign == 1 else f"has the wrong sign, and {text}"
    yield 2, "is counted twice (factor 2)"
    for name, value in _times(case):
        for power, sign in product((1, -1), (1, -1)):
            factor, minus = sign * value**power, "" if sign == 1 else "-"
            yield factor, f"is off by a factor {factor:.6g} = {minus}{'1 / ' if power < 0 else ''}{name}"


def _times(case: Case) -> Iterator[tuple[str, float]]:
    """Return the sigmas of the plan's times, and their differences."""
    called = {t: name for name, t in case.times.items()}
    ts = sorted({n.t for n in case.plan.nodes if isinstance(n.t, int) and n.t > 0}, reverse=True)
    sigmas = [(called.get(t, f"sigma_{t}"), float(case.trajectory.sigma(t))) for t in ts]
    yield from sigmas
    yield from ((f"({a} - {b})", x - y) for i, (a, x) in enumerate(sigmas) for b, y in sigmas[i + 1 :])


def _powers(term: Any) -> dict[str, int]:
    """Return the powers of the named factors in a term's coefficient."""
    factors = term.coefficient.as_powers_dict().items()
    return {str(base): int(power) for base, power in factors if base.is_Symbol and power.is_Integer}


def _power(name: str, power: int) -> str:
    return f"no {name}" if power == 0 else name if power == 1 else f"{name}^{power}"
