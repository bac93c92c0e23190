"""`Plan`: a frozen DAG of nodes, and the constructors that start one. It holds no tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trajsurgery.errors import PlanError, suggest
from trajsurgery.plans import graph, legality, notation
from trajsurgery.plans.expression import PARENTS, START, Factor, Node, Time, walk
from trajsurgery.plans.interpolants import Interpolant, RectifiedFlow
from trajsurgery.plans.nodes import PRIMITIVES, Latent, LatentNode, Leap, Noise, Recorded, Velocity, VelocityNode
from trajsurgery.plans.step_gain import StepGain

if TYPE_CHECKING:
    import networkx as nx

    from trajsurgery.plans.closed_form import Expansion


def latent(t: Time) -> LatentNode:
    """x_t of the rollout, a constant to autograd. t counts down from T (noise) to 0 (image); a name is bound later."""
    return Latent(t)


def noise() -> LatentNode:
    """x_T of the rollout, with a gradient to x_T itself (ReNO, arXiv 2406.04312)."""
    return Noise()


def recorded(t: Time) -> VelocityNode:
    """v_t of the rollout, a constant to autograd; t in 1..T."""
    return Recorded(t)


@dataclass(frozen=True)
class Cost:
    """Model calls of a plan on a trajectory."""

    calls: int
    """Velocity calls that the gradient reaches."""
    faithful: int
    """Of these, the ones whose value the rollout has recorded: under "recompute" their forward costs nothing."""
    extra: int
    """Model calls beyond the rollout's own that a forward pass needs in any way of running: the unfaithful ones."""
    unfaithful: tuple[int, ...] = ()
    """The times t, noise first, from which the plan leaps to t - 1 while the sampler stepped otherwise than by Euler:
    what looks like its own step is a prediction."""
    staged: tuple[int, ...] = ()
    """The times t, noise first, of the rollout's calls that "split" can't take from one pass of `operate`, because the
    sampler's call at t serves another call of the plan. As in the staged sweep, the backward pass makes them again."""

    def __str__(self) -> str:
        said = f"velocity calls with gradient: {self.calls}, {self.faithful} of them the rollout's own"
        if self.extra:
            said += f"; calls beside the rollout's: {self.extra}"
        if self.staged:
            times = ", ".join(map(str, self.staged))
            said += f"; split makes the calls at t = {times} again in the backward pass, as the staged sweep does"
        if self.unfaithful:
            times = ", ".join(map(str, self.unfaithful))
            said += f"; unfaithful: leap(t - 1) from t = {times} is a prediction, the sampler's step is no Euler step"
        return said


@dataclass(frozen=True, init=False, repr=False)
class Plan:
    """A directed acyclic graph of latents and velocities with one or more outputs: where the gradient may flow.

    Equal by structure, hashable, immutable. `steps` is the number of sampler steps it was drawn for, if it was.

    Raises:
        PlanError: the plan breaks a rule (`trajsurgery.plans.rules`); the message names it, where, and the repair.
    """

    outputs: tuple[LatentNode, ...]
    steps: int | None

    def __init__(self, *outputs: LatentNode, steps: int | None = None) -> None:
        object.__setattr__(self, "outputs", outputs)
        object.__setattr__(self, "steps", steps)
        legality.check_legal(outputs, steps)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node once, parents first."""
        return tuple(walk(self.outputs))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names still to bind, in order of appearance; "T" is bound by the run."""
        names = [value for node in self.nodes for key, value in node.settings().items()
                 if key in ("time", "to", "a") and isinstance(value, str) and value != START]  # fmt: skip
        return tuple(dict.fromkeys(names))

    @property
    def exact(self) -> bool:
        """Whether every output is connected at 0, so that its value is the rollout's x_0, bit for bit."""
        return graph.exact(self.outputs)

    @cached_property
    def graph(self) -> nx.DiGraph[Any]:
        """The networkx DAG: nodes with `op`, `t`, `output`, edges with `gradient`."""
        return graph.build(self.outputs)

    def at(self, **values: Any) -> Plan:
        """The plan with names bound: times to ints, factors to numbers (or either to another name).

        Raises:
            PlanError: a name that the plan does not have, or a bound plan that is illegal.
        """
        unknown = set(values) - set(self.names) - {START}
        if unknown:
            hint = suggest(min(unknown), self.names)
            raise PlanError(
                f"plan.at received {sorted(unknown)}, which the plan does not name.{hint} Its names: {self.names}."
            )
        bound = {name: _plain(value) for name, value in values.items()}

        def rename(field: str, value: Any) -> Any:
            if field not in ("time", "to", "a") or not isinstance(value, str):
                return value
            new = bound.get(value, value)
            return float(new) if field == "a" and isinstance(new, int) and not isinstance(new, bool) else new

        renamed: dict[Node, Any] = {}
        for node in self.nodes:
            renamed[node] = node.replace(renamed, rename)
        return Plan(*(renamed[output] for output in self.outputs), steps=self.steps)

    def prepared(self, steps: int) -> Plan:
        """The plan bound to a trajectory of `steps` steps.

        Raises:
            PlanError: names still unbound, a plan drawn for another number of steps, times above it.
        """
        if isinstance(steps, bool) or not isinstance(steps, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"a plan runs on a number of steps, an int, or on a trajectory; received {steps!r}.")
        return _prepared(self, steps)

    def cost(self, trajectory: Any) -> Cost:
        """The model calls that the plan costs on a trajectory, and what is unfaithful to it; printed, it says so.

        Args:
            trajectory: what rollout() returns, or a number of steps: a sampler of as many Euler steps.
        """
        plan = self.prepared(getattr(trajectory, "steps", trajectory))
        is_step = getattr(trajectory, "is_step", lambda _: True)
        recorded_values = graph.faithful(plan.outputs, is_step)
        calls = [node for node in graph.trained(plan.outputs) if isinstance(node, Velocity)]
        extra = sum(isinstance(node, Velocity) and node not in recorded_values for node in plan.nodes)
        steps = [n for n in plan.nodes if isinstance(n, Leap) and graph.own_step(n, lambda _: True)]
        times = {n.x.t for n in steps if isinstance(n.x.t, int)}
        apart = sorted((t for t in times if not is_step(t)), reverse=True)
        own = graph.made_in_rollout(plan.outputs, is_step, getattr(trajectory, "steps", trajectory))
        again = sorted((int(n.t) for n in calls if n in recorded_values and n not in own), reverse=True)
        return Cost(len(calls), sum(call in recorded_values for call in calls), extra, tuple(apart), tuple(again))

    def gradient(
        self, sigmas: Sequence[float] | None = None, interpolant: Interpolant | None = None, limit: int = 1000
    ) -> Expansion:
        """The closed form of d(output)/d(theta): a sum of terms, one for each path from a velocity call to an output.

        Args:
            sigmas: the T + 1 times of the sampler, noise first; with them coefficients are numbers, without symbols.
                Exact ones if all are ints or `fractions.Fraction`s, else floats.
            interpolant: rectified flow if left out.
            limit: how many terms are listed, by order of nesting; all of them are counted.

        Raises:
            PlanError: sigmas of no sampler; the plan does not fit len(sigmas) - 1 steps, or the limit is negative.
        """
        from trajsurgery.plans.closed_form import expand

        if interpolant is not None and not isinstance(interpolant, Interpolant):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"plan.gradient received interpolant={interpolant!r}: it is an object, RectifiedFlow().")
        if limit < 0:
            raise PlanError(f"plan.gradient received limit={limit}: it is the number of terms to list, 0 or more.")
        if sigmas is not None:
            legality.check_sampled(sigmas)
            legality.check_runnable(self.outputs, (), self.steps, len(sigmas) - 1)
            legality.check_legal(self.outputs, len(sigmas) - 1)
        return expand(self.outputs, sigmas, interpolant or RectifiedFlow(), limit)

    def draw(self, path: str | Path) -> Path:
        """Draws the rollout on one rail and the surgery on the other; the ending (svg, png, pdf, mmd) is the format."""
        from trajsurgery.plans.drawing.draw import draw

        return draw(self.outputs, self.steps, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (JSON): the nodes, parents first, each with its `op`, settings and its parents' indices."""
        index = {node: i for i, node in enumerate(self.nodes)}
        nodes: list[dict[str, Any]] = []
        for node in self.nodes:
            inputs = {name: [index[v] for v in value] if name == "velocities" else index[value]
                      for name, value in node.inputs.items()}  # fmt: skip
            settings = {k: asdict(v) if isinstance(v, StepGain) else v for k, v in node.settings().items()}
            nodes.append({"op": node.op, **settings, **inputs})
        return {"steps": self.steps, "nodes": nodes, "outputs": [index[output] for output in self.outputs]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            PlanError: an unknown op, a missing entry, a parent that comes later, or an illegal plan.
        """
        made: list[Any] = []
        try:
            for entry in data["nodes"]:
                made.append(_node(dict(entry), made))
            return cls(*(_at(index, made) for index in data["outputs"]), steps=data.get("steps"))
        except PlanError as error:
            if error.rules == ("setting",):
                raise PlanError(f"{error} Write the dict with plan.to_dict().", error.rules) from None
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"Plan.from_dict received a malformed dict, at node {len(made)}: {error!r}. Write it with "
                            "plan.to_dict().") from error  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.from_dict, (self.to_dict(),)

    def __str__(self) -> str:
        return notation.arrows(self.outputs)

    def __repr__(self) -> str:
        steps = "" if self.steps is None else f", steps={self.steps}"
        return f"Plan({notation.code(self.outputs)}{steps})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython and Hypothesis would else write out the fields of the dataclass."""
        printer.text(repr(self))


@lru_cache(maxsize=256)
def _prepared(plan: Plan, steps: int) -> Plan:
    legality.check_runnable(plan.outputs, plan.names, plan.steps, steps)
    bound = plan.at(**{START: steps})
    legality.check_legal(bound.outputs, steps)
    return bound


def _plain(value: Any) -> Time | Factor:
    """Numbers of other libraries (numpy's, 0-dim tensors) as Python's."""
    if isinstance(value, str | bool):
        return value
    for number in (operator.index, float):
        with suppress(TypeError, ValueError):
            return number(value)
    raise PlanError(f"plan.at received a {type(value).__name__}: names stand for numbers, or for other names.")


def _at(index: Any, made: list[Any]) -> Any:
    if not isinstance(index, int) or not 0 <= index < len(made):
        raise ValueError(f"index {index!r} of {len(made)} nodes")
    return made[index]


def _node(entry: dict[str, Any], made: list[Any]) -> Node:
    name = entry.pop("op")
    kind = PRIMITIVES.get(name)
    if kind is None:
        raise ValueError(f"unknown op {name!r}.{suggest(str(name), PRIMITIVES)} Known: {', '.join(PRIMITIVES)}")
    for name in entry.keys() & PARENTS:
        value = entry[name]
        entry[name] = tuple(_at(v, made) for v in value) if name == "velocities" else _at(value, made)
    if isinstance(entry.get("a"), Mapping):
        entry["a"] = StepGain(**entry["a"])
    if "discount" in entry:
        return entry["x"].leap(entry["to"], discount=entry["discount"], velocity=entry.get("v"))
    return kind(**entry)
