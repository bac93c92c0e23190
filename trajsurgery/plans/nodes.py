"""The primitives of the language, without tensors.

Constructors accept whatever has the right type; `legality.py` says whether a plan is legal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from trajsurgery.errors import PlanError
from trajsurgery.plans.expression import START as START
from trajsurgery.plans.expression import Draw, Factor, Node, Time
from trajsurgery.plans.expression import walk as walk


class LatentNode(Node):
    """A node that stands for a latent x_t."""

    def velocity(self, field: str | None = None) -> Velocity:
        """v_theta(x, sigma_t): a fresh call of the model; `field` names another field than the default one."""
        return Velocity(self, field)

    def leap(self, to: Time, discount: Factor | None = None, velocity: VelocityNode | None = None) -> Leap:
        """One straight hop A x + B v to an earlier time, Eq. 3 (Eq. 20 for other interpolants).

        The velocity is the one given, or else `self.discount(discount).velocity()`.

        Raises:
            PlanError: both `discount` and `velocity` are given.
        """
        if velocity is not None and discount is not None:
            raise PlanError(
                f"leap({to!r}) from x_{self.t} received both discount={discount!r} and velocity={velocity!r}: the "
                "discount is of the input of the leap's own call. Drop it, or put it on the velocity's input "
                "(x.discount(a).velocity()).",
                rules=("one-velocity",),
            )
        if velocity is None:
            velocity = (self if discount is None else self.discount(discount)).velocity()
        return Leap(self, _velocity(velocity), to)

    def advance(self, to: Time, velocities: Sequence[VelocityNode], rule: str = "lagrange") -> Advance:
        """x + sum_i w_i v_i: the integral of dx/dsigma = v by quadrature over several velocities."""
        if isinstance(velocities, Node) or not isinstance(velocities, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                f"advance({to!r}) from x_{self.t} received {velocities!r} for its velocities: give a list of them.",
                rules=("kinds",),
            )
        return Advance(self, tuple(map(_velocity, velocities)), to, rule)

    def connect(self) -> Connect:
        """The rollout's own x_t, exactly; the gradient is the prediction's (Eq. 6-7)."""
        return Connect(self)

    def discount(self, a: Factor) -> Discount:
        """The same value; the gradient times a, in [0, 1] (Eq. 9)."""
        return Discount(self, _factor(a))

    def detach(self) -> Detach:
        """The same value; no gradient."""
        return Detach(self)

    def renoise(self, to: Time, draw: Draw = 0) -> Renoise:
        """alpha_to x + beta_to eps_draw, from t = 0; the gradient times alpha_to."""
        return Renoise(self, to, draw)

    def recover(self, draw: Draw = 0) -> Recover:
        """(x - beta_t eps_draw) / alpha_t at t = 0: SRPO's analytic recovery (arXiv 2509.06942).

        The noise is that of the renoised sample with this draw which x descends from.
        """
        return Recover(self, draw)


class VelocityNode(Node):
    """A node that stands for a velocity v_t."""

    def scale(self, a: Factor) -> Scale:
        """The same value; the gradient times a, finite and >= 0, or a `StepGain`."""
        return Scale(self, _factor(a))

    discount = scale

    def detach(self) -> DetachVelocity:
        """The same value; no gradient."""
        return DetachVelocity(self)


class Latent(LatentNode):
    """x_t of the rollout: a constant."""

    time: Time


class Noise(LatentNode):
    """x_T of the rollout, with a gradient to x_T itself (ReNO)."""

    time: Time = START


class Recorded(VelocityNode):
    """v_t of the rollout: a constant."""

    time: Time


class Connect(LatentNode):
    """The rollout's x_t with the gradient of the prediction."""

    x: LatentNode


class Discount(LatentNode):
    """The same latent, its gradient times a."""

    x: LatentNode
    a: Factor


class Detach(LatentNode):
    """The same latent without gradient."""

    x: LatentNode


class Velocity(VelocityNode):
    """A call of the model."""

    x: LatentNode
    field: str | None = None


class Scale(VelocityNode):
    """The same velocity, its gradient times a."""

    v: VelocityNode
    a: Factor


class DetachVelocity(VelocityNode):
    """The same velocity without gradient."""

    v: VelocityNode


class Leap(LatentNode):
    """A x + B v at an earlier time."""

    x: LatentNode
    v: VelocityNode
    to: Time


class Advance(LatentNode):
    """x + sum_i w_i v_i at an earlier time."""

    x: LatentNode
    velocities: tuple[VelocityNode, ...]
    to: Time
    rule: str = "lagrange"


class Renoise(LatentNode):
    """alpha_to x + beta_to eps at a later time."""

    x: LatentNode
    to: Time
    draw: Draw = 0


class Recover(LatentNode):
    """(x - beta_t eps) / alpha_t at t = 0."""

    x: LatentNode
    draw: Draw = 0

    @property
    def t(self) -> Time:
        return 0


PRIMITIVES = {kind.op: kind for kind in (*LatentNode.__subclasses__(), *VelocityNode.__subclasses__())}


def _velocity(v: Any) -> VelocityNode:
    """Return the node, whose kind `legality.py` checks; tensors and names are refused."""
    if not isinstance(v, Node):
        raise PlanError(
            f"a velocity of the plan received a {type(v).__name__}: it is a node, x.velocity() or recorded(t).",
            rules=("kinds",),
        )
    return cast(VelocityNode, v)


def _factor(a: Any) -> Factor:
    """1 and 1.0 are one factor; a name stays a name."""
    return float(a) if isinstance(a, int | float) and not isinstance(a, bool) else cast(Factor, a)
