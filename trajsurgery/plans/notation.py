"""A plan as text: the paper's arrows, and the expression that builds it."""

from __future__ import annotations

from collections.abc import Sequence

from trajsurgery.plans import nodes
from trajsurgery.plans.expression import Node, walk

LONGEST_CODE = 2000
"""Characters. A plan whose expression is longer has a summary for its repr: written out, shared nodes multiply."""


def arrows(outputs: Sequence[Node]) -> str:
    """The paper's notation, one line an output: `x_k -> (x^_j|k --> x_j) -> (x^_0|j --> x_0)`.

    A solid arrow is a leap by the model's velocity at its start, a labelled one a leap by another velocity, `-->` a
    connector, `~>` a renoised or recovered sample, `sg` a stopped gradient. Discounts change no value and are left out.
    """
    return "\n".join("".join(_chain(output)) for output in outputs)


def code(outputs: Sequence[Node]) -> str:
    """The expression that builds the outputs."""
    written: dict[Node, str] = {}
    for node in walk(outputs):
        written[node] = _code(node, written)
        if len(written[node]) > LONGEST_CODE:
            return f"<{len(outputs)} outputs of {sum(1 for _ in walk(outputs))} nodes>"
    return ", ".join(written[output] for output in outputs)


def _chain(node: Node) -> list[str]:
    """The pieces of the line that ends in the node; the last piece is the node's own value."""
    spine: list[Node] = [node]
    while not isinstance(spine[-1], nodes.Latent | nodes.Noise | nodes.VelocityNode):
        spine.append(spine[-1].parents[0])
    pieces: list[str] = []
    for step in reversed(spine):
        match step:
            case nodes.Leap():
                pieces += [_arrow(step), f"x^_{step.to}|{step.x.t}"]
            case nodes.Advance():
                velocities = ", ".join(_velocity(v, step.x) for v in step.velocities)
                pieces += [f" -[{step.rule}: {velocities}]-> ", f"x^_{step.to}|{step.x.t}"]
            case nodes.Renoise():
                pieces += [" ~> ", f"x_{step.to}^({step.draw})"]
            case nodes.Recover():
                pieces += [" ~> ", f"x^_0|{step.x.t}"]
            case nodes.Connect():
                pieces[-1] = f"({pieces[-1]} --> x_{step.t})"
            case nodes.Detach():
                pieces[-1] = f"sg({pieces[-1]})"
            case nodes.Discount():
                pass
            case nodes.VelocityNode():
                pieces.append(_velocity(step, None))
            case _:
                pieces.append(f"x_{step.t}")
    return pieces


def _arrow(leap: nodes.Leap) -> str:
    """A plain arrow for the model's velocity at the leap's start, a labelled one for any other."""
    plain = isinstance(leap.v, nodes.Velocity) and leap.v.field is None and _is_discounted(leap.v.x, leap.x)
    return " -> " if plain else f" -[{_velocity(leap.v, leap.x)}]-> "


def _is_discounted(y: Node, x: Node | None) -> bool:
    """Whether y is x, or x behind discounts."""
    while y is not x and isinstance(y, nodes.Discount):
        y = y.x
    return y is x


def _velocity(v: Node, start: nodes.LatentNode | None) -> str:
    match v:
        case nodes.Velocity():
            name = "v" if v.field is None else f"v.{v.field}"
            if _is_discounted(v.x, start):
                return f"{name}_{v.t}"
            if isinstance(v.x, nodes.Detach) and v.x.x is start:
                return f"{name}(sg x_{v.t})"
            return f"{name}({_chain(v.x)[-1]})"
        case nodes.Scale():
            return f"{v.a}*{_velocity(v.v, start)}"
        case nodes.DetachVelocity():
            return f"sg({_velocity(v.v, start)})"
        case _:
            return f"v_{v.t} recorded"


def _code(node: Node, written: dict[Node, str]) -> str:
    match node:
        case nodes.Latent() | nodes.Recorded():
            return f"{node.op}({node.time!r})"
        case nodes.Noise():
            return "noise()"
        case nodes.Leap():
            called = node.v.x if isinstance(node.v, nodes.Velocity) and node.v.field is None else None
            velocity = f", velocity={written[node.v]}"
            if isinstance(called, nodes.Discount) and called.x is node.x:
                velocity = f", discount={called.a!r}"
            return f"{written[node.x]}.leap({node.to!r}{'' if called is node.x else velocity})"
        case nodes.Advance():
            velocities = ", ".join(written[v] for v in node.velocities)
            return f"{written[node.x]}.advance({node.to!r}, [{velocities}], rule={node.rule!r})"
        case nodes.Velocity():
            return f"{written[node.x]}.velocity({'' if node.field is None else repr(node.field)})"
        case _:
            method = "detach" if isinstance(node, nodes.DetachVelocity) else node.op
            values = ", ".join(repr(value) for value in node.settings().values())
            return f"{written[node.parents[0]]}.{method}({values})"
