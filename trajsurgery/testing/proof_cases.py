"""What a proof runs on: a bound plan, a field and a trajectory, drawn at random where they are not given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trajsurgery.errors import PlanError
from trajsurgery.plans.graph import trained
from trajsurgery.plans.nodes import START, Discount, Node, Noise, Scale, Velocity
from trajsurgery.plans.plan import Plan
from trajsurgery.surgery.api import rollout
from trajsurgery.surgery.parameters import Fields, field_named, leaves
from trajsurgery.surgery.trajectory import Trajectory
from trajsurgery.testing.velocity_fields import MLP, Gaussian

STEPS, SHAPE = 8, (6, 4)
TRIES = 200


class Method(Protocol):
    """Draws a plan for a number of steps."""

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        """A plan for a sampler of `steps` steps."""
        ...


Drawable = Plan | Method | Callable[..., Plan]


@dataclass(frozen=True)
class Bound:
    """A plan without names, and the values of its names."""

    plan: Plan
    times: Mapping[str, int] = field(default_factory=dict[str, int])
    factors: Mapping[str, float] = field(default_factory=dict[str, float])
    """Every factor of the plan that is neither 0 nor 1, by name."""


@dataclass(frozen=True, eq=False)
class Case:
    """A plan on a trajectory of a field."""

    bound: Bound
    trajectory: Trajectory
    fields: Fields
    params: tuple[Tensor, ...]
    values_only: bool = False
    """Whether the field is one of the built-in ones of lower precision, for which only values are checked."""

    @property
    def plan(self) -> Plan:
        """The plan, bound to the trajectory's steps."""
        return self.bound.plan

    @property
    def wrt(self) -> tuple[Tensor, ...]:
        """The variables of the gradient: the parameters, and x_T if the plan passes it a gradient."""
        start = self.trajectory.start if any(isinstance(node, Noise) for node in trained(self.plan.outputs)) else None
        return self.params if start is None else (*self.params, start)

    def cotangents(self, seed: int) -> tuple[Tensor, ...]:
        """A random cotangent for each output."""
        generator, like = torch.Generator().manual_seed(seed), self.trajectory[0]
        draw = lambda: torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)  # noqa: E731
        return tuple(draw() for _ in self.plan.outputs)

    def direction(self, seed: int) -> tuple[Tensor, ...]:
        """A random direction of `wrt`, each part as long as the variable."""
        generator = torch.Generator().manual_seed(seed)
        parts: list[Tensor] = []
        for leaf in self.wrt:
            d = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            size = float(leaf.detach().norm()) or 1.0
            parts.append((d * size / max(float(d.norm()), 1e-12)).to(leaf))
        return tuple(parts)


def cases(
    plan: Drawable, fields: Fields | None, trajectory: Trajectory | None, steps: int | None, draws: int, shape: Any
) -> Iterator[Case]:
    """Yield the cases of a proof; without a field, an MLP in every dtype and the exact Gaussian field."""
    if trajectory is not None:
        steps = trajectory.steps
    once = isinstance(plan, Plan) and not plan.names and fields is not None
    for seed in range(1 if once else draws):
        bound = bind_names(plan, steps, seed)
        count = steps or max(STEPS, bound.plan.steps or _highest(bound.plan))
        bound = Bound(bound.plan.prepared(count), bound.times, bound.factors)
        for given in [fields] if fields is not None else _own(bound.plan, shape or SHAPE, seed):
            rolled = trajectory or _random_rollout(given, count, shape or SHAPE, seed)
            low = fields is None and rolled[0].dtype != torch.float64
            yield Case(bound, rolled, given, parameters(bound.plan, rolled, given), low)


def parameters(plan: Plan, trajectory: Trajectory, fields: Fields) -> tuple[Tensor, ...]:
    """Return what trains in all fields that the plan calls."""
    names = dict.fromkeys(node.field for node in plan.nodes if isinstance(node, Velocity))
    t, required = trajectory.steps, not any(isinstance(node, Noise) for node in plan.nodes)
    by_id: dict[int, Tensor] = {}
    for name in names:
        leaves_of_field = leaves(field_named(fields, name), trajectory[t], trajectory.sigma(t), required=required)
        by_id.update((id(leaf), leaf) for leaf in leaves_of_field)
    return tuple(by_id.values())


def bind_names(plan: Drawable, steps: int | None, seed: int) -> Bound:
    """Return a plan without names: a method's draw, or names bound at random.

    Raises:
        PlanError: it is neither, or no times suit it.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(plan, Plan):
        return _at_random(plan, steps or max(STEPS, plan.steps or _highest(plan)), {}, generator)
    if hasattr(plan, "draw"):
        drawn = plan.draw(steps or STEPS, generator)  # pyright: ignore[reportFunctionMemberAccess,reportAttributeAccessIssue]
        settings = getattr(plan, "__dict__", {})
        return Bound(drawn, {}, _factors(drawn, {n: v for n, v in settings.items() if isinstance(v, float)}))
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
    factors = {n.a: defaults.get(n.a, 0.3) for n in plan.nodes if isinstance(n, Discount | Scale) and n.a in plan.names}
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
        return Bound(bound, at, _factors(bound, {str(name): a for name, a in factors.items()}))
    raise PlanError(f"no times among 1..{steps} were found for {times} of {plan}: bind them with plan.at(...).")


def _factors(plan: Plan, known: Mapping[str, float]) -> dict[str, float]:
    """Return the factors of a bound plan by name: the method's names, else alpha, alpha_2, ..."""
    called = {value: name for name, value in reversed(list(known.items()))}
    values = dict.fromkeys(float(n.a) for n in plan.nodes if isinstance(n, Discount | Scale) and n.a not in (0, 1))
    free = iter(["alpha", *(f"alpha_{i}" for i in range(2, len(values) + 2))])
    return {called[a] if a in called else next(n for n in free if n not in known): a for a in values}


def _highest(plan: Plan) -> int:
    return max((node.t for node in plan.nodes if isinstance(node.t, int)), default=1)


def _own(plan: Plan, shape: Sequence[int], seed: int) -> Iterator[Fields]:
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
    sigmas = torch.cat([widths.flip(0).cumsum(0).flip(0) / widths.sum(), widths.new_zeros(1)])
    like = next(iter(getattr(field_named(fields, None), "parameters", lambda: ())()), widths)
    start = torch.randn(*shape, generator=generator, dtype=torch.float64).to(like).detach().requires_grad_()
    return rollout(fields, start, sigmas.clamp(max=1).to(start.device, torch.promote_types(like.dtype, torch.float32)))


def is_stop(node: Node) -> bool:
    """Whether the plan stops the gradient at this node."""
    return node.op in ("detach", "detach_velocity") or (isinstance(node, Discount | Scale) and node.a == 0)


def time_of(t: Any, steps: int) -> int:
    """Return a time as a number."""
    return steps if t == START else int(t)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
    return math.hypot(*(float(t.detach().double().norm()) for t in tensors))
