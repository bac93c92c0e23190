"""Whether a plan is legal: the rules of its nodes (`rules.py`), and those of the plan as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trajsurgery.errors import PlanError
from trajsurgery.plans.graph import trained
from trajsurgery.plans.nodes import LatentNode, Node, walk
from trajsurgery.plans.notation import arrows
from trajsurgery.plans.rules import RULES, Rule


@dataclass(frozen=True)
class Violation:
    """A rule, broken somewhere."""

    rule: str
    message: str


PLAN_RULES: dict[str, tuple[str, str]] = {
    "outputs": ("a plan has at least one output, and each is a latent",
                "End each output in a leap, advance or connect."),
    "trains": ("every output trains something: this plan trains nothing",
               "Let a gradient path without detach, recorded() or a factor of 0 lead from each output to a velocity() "
               "or to noise()."),
    "steps-type": ("steps is a positive int", "Give the sampler's number of steps, or leave it out."),
    "steps": ("a plan drawn for T steps runs on T steps",
              "Draw the plan with the sampler's number of steps, or run the sampler with the plan's."),
    "unbound": ("a plan that is run has no unbound names", "Bind them: plan.at(name=...)."),
    "one-velocity": ("a leap takes a discount or a velocity, not both", "Drop one of them."),
}  # fmt: skip
"""Rules about the plan as a whole: demand and repair."""


def violations(outputs: Sequence[Any], steps: Any = None) -> list[Violation]:
    """Every broken rule of a plan that may still hold names."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        return [_plan_violation("steps-type", f"steps={steps!r}")]
    if not outputs or not all(isinstance(output, LatentNode) for output in outputs):
        return [_plan_violation("outputs", f"{[getattr(o, 'op', o) for o in outputs]}")]
    found: list[Violation] = []
    for node in walk(outputs):
        for rule in RULES.values():
            if isinstance(node, rule.on):
                found += [_violation(rule, node, received) for received in rule.broken(node, steps)]
        if found and found[-1].rule == "kinds":
            return found
    if not found:
        idle = [output for output in outputs if not trained([output])]
        found += [_plan_violation("trains", arrows([output])) for output in idle]
    return found


def check_legal(outputs: Sequence[Any], steps: int | None = None) -> None:
    """Raises PlanError with every broken rule."""
    _raise(violations(outputs, steps))


def check_bound(outputs: Sequence[Node], names: Sequence[str]) -> None:
    """Raises PlanError if names are left to bind."""
    if names:
        _raise([_plan_violation("unbound", f"{', '.join(names)} in {arrows(outputs)}")])


def check_runnable(outputs: Sequence[Node], names: Sequence[str], planned: int | None, steps: int) -> None:
    """Raises PlanError if a plan drawn for `planned` steps has names, or does not fit `steps` steps."""
    check_bound(outputs, names)
    if planned is not None and planned != steps:
        _raise([_plan_violation("steps", f"a plan for {planned} steps, a trajectory of {steps}")])


def check_sampled(sigmas: Any) -> None:
    """Raises PlanError unless sigmas are a sampler's [T + 1] times: finite, strictly monotone, in [0, 1]."""
    try:
        times = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor without numbers
        times = []
    steps = [after - before for before, after in pairwise(times)]
    falls = all(step < 0 for step in steps) or all(step > 0 for step in steps)
    if not steps or not falls or not all(0 <= time <= 1 for time in times):
        raise PlanError(
            f"the sigmas received, {sigmas!r:.80}, are no sampler's: T + 1 finite numbers in [0, 1], strictly "
            "monotone, noise first, [1.0, 0.5, 0.0]."
        )


def _raise(found: list[Violation]) -> None:
    if found:
        raise PlanError("\n".join(v.message for v in found), rules=tuple(dict.fromkeys(v.rule for v in found)))


def _violation(rule: Rule, node: Node, received: str) -> Violation:
    where = f", at {node!r}" if rule.id == "kinds" else f", in {arrows([node])}"
    return Violation(rule.id, f"[{rule.id}] {rule.demand}. Received {received}{where}. {rule.repair}")


def _plan_violation(rule: str, received: str) -> Violation:
    demand, repair = PLAN_RULES[rule]
    return Violation(rule, f"[{rule}] {demand}. Received {received}. {repair}")
