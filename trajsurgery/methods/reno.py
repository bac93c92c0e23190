"""ReNO (Eyring et al., 2024, arXiv 2406.04312): the initial noise is optimised, the model stays as it is."""

from __future__ import annotations

from trajsurgery.node import Time
from trajsurgery.plan import Plan, noise


def reno(*through: Time) -> Plan:
    """x_T -> (x^_t|T --> x_t) -> ... -> (x^_0 --> x_0), with the gradient of x_T: leaps over the times given.

    Without a time it is one leap, the original's one-step generator. Gradient of one leap, T standing for its sigma:
    dx_T/dx_T - T dv/dx_T. Deviation: the original knows one step only.

    Args:
        through: times below T, falling, on which leaps land, or names.
    """
    x = noise()
    for to in (*through, 0):
        x = x.leap(to).connect()
    return Plan(x)
