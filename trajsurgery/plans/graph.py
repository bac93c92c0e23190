"""The plan as a networkx DAG, and what can be read off it: where gradients flow, which values are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trajsurgery.plans import nodes
from trajsurgery.plans.expression import Node, walk
from trajsurgery.plans.nodes import Noise, Time, Velocity

if TYPE_CHECKING:
    import networkx as nx


def build(outputs: Sequence[Node]) -> nx.DiGraph[Any]:
    """The DAG whose nodes are the plan's (attributes `op`, `t`, `output`) and whose edges run from parent to child.

    An edge's `gradient` says whether a gradient passes back along it.
    """
    import networkx as nx

    graph: nx.DiGraph[Any] = nx.DiGraph()
    for node in walk(outputs):
        graph.add_node(node, op=node.op, t=node.t, output=node in outputs)
        for parent in node.parents:
            graph.add_edge(parent, node, gradient=passes_gradient(node))
    return graph


def passes_gradient(node: Node) -> bool:
    """Whether a gradient that arrives at the node goes on to its parents."""
    blocked = isinstance(node, nodes.Detach | nodes.DetachVelocity | nodes.Latent | nodes.Recorded)
    return not blocked and not (isinstance(node, nodes.Discount | nodes.Scale) and node.a == 0)


def reached(outputs: Sequence[Node]) -> list[Node]:
    """The nodes at which a gradient from the outputs arrives, children before parents."""
    found: set[Node] = set(outputs)
    order: list[Node] = []
    for node in reversed(list(walk(outputs))):
        if node in found:
            order.append(node)
            found.update(node.parents if passes_gradient(node) else ())
    return order


def trained(outputs: Sequence[Node]) -> list[Node]:
    """The velocity calls and x_T to which a gradient arrives, in the order of the forward pass."""
    return [node for node in reversed(reached(outputs)) if isinstance(node, Velocity | Noise)]


def needs_gradient(outputs: Sequence[Node]) -> set[Node]:
    """The nodes that depend differentiably on a velocity call or on x_T."""
    live: set[Node] = set()
    for node in walk(outputs):
        source = isinstance(node, Velocity | Noise)
        if source or (passes_gradient(node) and any(parent in live for parent in node.parents)):
            live.add(node)
    return live


def exact(outputs: Sequence[Node]) -> bool:
    """Whether every output is connected at 0: its value is the rollout's x_0, bit for bit."""
    recorded_values = faithful(outputs, lambda _: False)
    return all(output.t == 0 and output in recorded_values for output in outputs)


def faithful(outputs: Sequence[Node], is_step: Callable[[int], bool]) -> set[Node]:
    """The nodes whose value the rollout recorded: latents that are its x_t, velocities that are its v_t.

    `is_step(t)` says whether the sampler went from t to t - 1 by Euler on a rectified flow, so that `leap(t - 1)` is
    its own step.
    """
    found: set[Node] = set()
    for node in walk(outputs):
        if is_faithful(node, found, is_step):
            found.add(node)
    return found


def made_in_rollout(outputs: Sequence[Node], is_step: Callable[[int], bool], steps: int) -> set[Node]:
    """The calls with gradient that the sampler's own calls serve, where `operate` runs the plan in one pass.

    The sampler makes one call at each time, so it serves one of the plan's, the first whose input exists by then.
    """
    recorded_values, differentiable, calls = faithful(outputs, is_step), needs_gradient(outputs), set(trained(outputs))
    served = dict[Any, Node]()
    late = set[Node]()  # nodes whose values exist only after the rollout
    for node in walk(outputs):
        if isinstance(node, nodes.Renoise | nodes.Recover) or not late.isdisjoint(node.parents):
            late.add(node)
        elif isinstance(node, Velocity) and (node in calls or node not in recorded_values):
            at_noise = node.t == steps and node.x in differentiable  # the loop draws x_T itself
            if node not in recorded_values or node.t in served or at_noise:
                late.add(node)
            else:
                served[node.t] = node
    return set(served.values())


def is_faithful(node: Node, known: set[Node], is_step: Callable[[int], bool]) -> bool:
    """Whether the rollout recorded the node's value, given which of its parents' it recorded."""
    match node:
        case nodes.Latent() | Noise() | nodes.Connect() | nodes.Recorded():
            return True
        case nodes.Discount() | nodes.Detach() | nodes.Scale() | nodes.DetachVelocity():
            return node.parents[0] in known
        case Velocity():
            return node.field is None and node.x in known
        case nodes.Leap():
            return known.issuperset(node.parents) and own_step(node, is_step)
        case _:
            return False


def own_step(leap: nodes.Leap, is_step: Callable[[int], bool]) -> bool:
    """Whether a leap between faithful values is the sampler's own step."""
    t = leap.x.t
    return isinstance(t, int) and leap.to == t - 1 and is_step(t)


def last_needed_time(plan: Iterable[Node]) -> int:
    """Return the last time of the rollout that a value of a bound plan's nodes needs."""

    def read(node: Node) -> Time | None:
        if isinstance(node, nodes.Latent | nodes.Recorded | nodes.Connect):
            return node.t
        if isinstance(node, nodes.Renoise | nodes.Recover):  # noises are drawn like x_0
            return 0
        step = isinstance(node, nodes.Leap) and isinstance(node.x.t, int) and node.to == node.x.t - 1
        return node.t if step else None

    return min((t for node in plan if isinstance(t := read(node), int)), default=0)
