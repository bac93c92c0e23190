"""What a proof runs on: a bound plan, a field and a trajectory, drawn at random where they are not given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trajsurgery.errors import PlanError
from trajsurgery.plans.graph import trained
from trajsurgery.plans.nodes import Discount, Noise, Scale, Velocity
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.api import rollout
from trajsurgery.surgery.parameters import Field, Fields, field_named, leaves_of_calls
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.testing.velocity_fields import MLP, Gaussian

STEPS, TRIES = 8, 200


class Method(Protocol):
    """Draws a plan for a number of steps."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps."""
        ...


Drawable = Plan | Method | Callable[..., Plan]


Bound = tuple[Plan, Mapping[str, int], Mapping[str, float]]
"""A plan without names, and the values of its names: its times, and its factors that are neither 0 nor 1."""


@dataclass(frozen=True, eq=False)
class Case:
    """A plan, bound to the steps of a trajectory of a field."""

    plan: Plan
    times: Mapping[str, int]
    factors: Mapping[str, float]
    trajectory: Trajectory
    fields: Mapping[str | None, Field]
    params: tuple[Tensor, ...]
    values_only: bool = False
    """Whether the field is one of the built-in ones of lower precision, for which only values are checked."""

    @property
    def wrt(self) -> tuple[Tensor, ...]:
        """The variables of the gradient: the parameters, and x_T if the plan passes it a gradient."""
        start = self.trajectory.start if Noise in map(type, trained(self.plan.outputs)) else None
        return self.params if start is None else (*self.params, start)

    def cotangents(self, seed: int) -> tuple[Tensor, ...]:
        """A random cotangent for each output."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(_normal(self.trajectory[0], generator) for _ in self.plan.outputs)

    def direction(self, seed: int) -> tuple[Tensor, ...]:
        """A random direction of `wrt`, each part as long as the variable."""
        generator = torch.Generator().manual_seed(seed)
        parts = [(leaf.detach(), _normal(leaf, generator)) for leaf in self.wrt]
        return tuple(d * ((float(leaf.norm()) or 1.0) / max(float(d.norm()), 1e-12)) for leaf, d in parts)


def cases(
    plan: Drawable,
    fields: Fields | None,
    trajectory: Trajectory | None,
    steps: int | None,
    draws: int,
    shape: Sequence[int],
) -> Iterator[Case]:
    """Yield the cases of a proof; without a field, an MLP in every dtype and the exact Gaussian field."""
    steps = steps if trajectory is None else trajectory.steps
    users = None if fields is None else fields if isinstance(fields, Mapping) else {None: fields}
    once = isinstance(plan, Plan) and not plan.names and users is not None
    for seed in range(1 if once else draws):
        bound, times, factors = bind_names(plan, steps, seed)
        bound = bound.prepared(steps or _enough_steps(bound))
        for by_name in _built_in_fields(bound, shape, seed) if users is None else [users]:
            rolled = trajectory or _random_rollout(by_name, steps or _enough_steps(bound), shape, seed)
            params = leaves_of_calls(by_name, bound.nodes, rolled)
            low = users is None and rolled[0].dtype != torch.float64
            yield Case(bound, times, factors, rolled, by_name, params, low)


def bind_names(plan: Drawable, steps: int | None, seed: int) -> Bound:
    """Return a plan without names, a method's draw or names bound at random, or raise PlanError if no times suit it."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(plan, Plan):
        return _at_random(plan, steps or _enough_steps(plan), {}, generator)
    if hasattr(plan, "draw"):
        drawn = plan.draw(steps or STEPS, generator)  # pyright: ignore[reportFunctionMemberAccess,reportAttributeAccessIssue]
        if not isinstance(drawn, Plan):
            raise PlanError(
                f"{type(plan).__name__}.draw returned a {type(drawn).__name__}: a method's draw returns Plan(output, "
                "..., steps=steps)."
            )
        settings = getattr(plan, "__dict__", {})
        return drawn, {}, _factors(drawn, {n: v for n, v in settings.items() if isinstance(v, float)})
    named_plan, defaults = _of_names(plan)
    return _at_random(named_plan, steps or STEPS, defaults, generator)


def _of_names(function: Any) -> tuple[Plan, dict[str, float]]:
    """Return the plan of a function of times called with names, and its defaults."""
    name = getattr(function, "__name__", type(function).__name__)
    mend = f"call it yourself (check_gradient({name}(...))), or give a method, an object with .draw(steps, generator)"
    try:
        arguments = inspect.signature(function).parameters
        plan = function(*arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"check_gradient received {name}, which takes no names for times ({error}): {mend}.") from error
    if not isinstance(plan, Plan):
        raise PlanError(f"check_gradient received {name}, which returns a {type(plan).__name__} and no plan: {mend}.")
    defaults = {n: p.default for n, p in arguments.items() if isinstance(p.default, float) and 0 < p.default < 1}
    return plan, defaults


def _at_random(plan: Plan, steps: int, defaults: Mapping[str, float], generator: torch.Generator) -> Bound:
    """Return the plan with random legal times, in falling order first, and its factors at their defaults."""
    named = [n.a for n in plan.nodes if isinstance(n, Discount | Scale) and isinstance(n.a, str)]
    factors = {name: defaults.get(name, 0.3) for name in named}
    times = [name for name in plan.names if name not in factors]
    for i in range(TRIES):
        drawn = (1 + torch.randperm(steps, generator=generator)[: len(times)]).tolist()
        drawn = sorted(drawn, reverse=True) if i < TRIES // 2 else drawn
        if len(drawn) < len(times):
            break
        at = {name: int(t) for name, t in zip(times, drawn, strict=True)}
        try:
            bound = plan.at(**at, **factors)
        except PlanError:
            continue
        return bound, at, _factors(bound, factors)
    raise PlanError(f"no times among 1..{steps} were found for {times} of {plan}: bind them with plan.at(...).")


def _factors(plan: Plan, known: Mapping[str, float]) -> dict[str, float]:
    """Return the factors of a bound plan by name: the method's names, else alpha, alpha_2, ..."""
    called = {value: name for name, value in reversed(list(known.items()))}
    numbers = [n.a for n in plan.nodes if isinstance(n, Discount | Scale) and isinstance(n.a, float)]
    values = dict.fromkeys(a for a in numbers if a not in (0.0, 1.0))
    free = iter(["alpha", *(f"alpha_{i}" for i in range(2, len(values) + 2))])
    return {called[a] if a in called else next(n for n in free if n not in known): a for a in values}


def _enough_steps(plan: Plan) -> int:
    return max(STEPS, plan.steps or max((node.t for node in plan.nodes if isinstance(node.t, int)), default=1))


def _built_in_fields(plan: Plan, shape: Sequence[int], seed: int) -> Iterator[Mapping[str | None, Field]]:
    names = dict.fromkeys((None, *(node.field for node in plan.nodes if isinstance(node, Velocity))))
    dim = shape[-1]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        yield {name: MLP(dim, seed=seed + 100 * i, dtype=dtype) for i, name in enumerate(names)}
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2 * len(names), dim, generator=generator, dtype=torch.float64)
    yield {name: Gaussian(draws[2 * i], 0.3 + draws[2 * i + 1].abs()) for i, name in enumerate(names)}


def _random_rollout(fields: Fields, steps: int, shape: Sequence[int], seed: int) -> Trajectory:
    """Return a rollout over random times from random noise, in the field's dtype."""
    generator = torch.Generator().manual_seed(seed)
    widths = 1 + torch.rand(steps, generator=generator, dtype=torch.float64)
    sigmas = torch.cat([widths.flip(0).cumsum(0).flip(0) / widths.sum(), widths.new_zeros(1)]).clamp(max=1)
    like = next(iter(getattr(field_named(fields, None), "parameters", lambda: ())()), widths)
    start = _normal(like.detach().new_empty(*shape), generator).requires_grad_()
    return rollout(fields, start, sigmas.to(start.device, torch.promote_types(like.dtype, torch.float32)))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random tensor like this one: the same numbers in every dtype."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
    return math.hypot(*(float(t.detach().double().norm()) for t in tensors))


def distance(measured: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the norm of the difference, relative to that of what was expected."""
    difference = [a.double() - b.double() for a, b in zip(measured, expected, strict=True)]
    return norm(difference) / max(norm(expected), 1e-300)
