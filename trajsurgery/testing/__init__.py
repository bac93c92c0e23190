"""Tests for your own plans and methods: `check_gradient`, and Hypothesis strategies.

gradient_proof.py     `check_gradient` and its `Proof`
proof_cases.py        the plans, fields and trajectories that a proof runs on
ways_of_running.py    the gradient of a case in every way of running, and checks of its values
frozen_reference.py   the plan as a smooth function, for finite differences
diagnosis.py          which term of the closed form is wrong, and by which factor
strategies.py         Hypothesis strategies (need hypothesis, imported on first use)
velocity_fields.py    small fields whose trajectories bend

It may import everything up to `methods`.
"""

from typing import TYPE_CHECKING, Any

from trajsurgery.testing.gradient_proof import Proof as Proof
from trajsurgery.testing.gradient_proof import check_gradient as check_gradient
from trajsurgery.testing.velocity_fields import MLP as MLP
from trajsurgery.testing.velocity_fields import Gaussian as Gaussian

if TYPE_CHECKING:
    from trajsurgery.testing.strategies import *  # noqa: F403

_STRATEGIES = ("INTERPOLANTS", "MOVES", "factors", "fields", "methods", "plans", "sigmas", "trajectories")
__all__ = ["MLP", "Gaussian", "Proof", "check_gradient", *_STRATEGIES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _STRATEGIES:
        raise AttributeError(f"module 'trajsurgery.testing' has no attribute {name!r}")
    from trajsurgery.testing import strategies

    return getattr(strategies, name)


def __dir__() -> list[str]:
    return [*globals(), *_STRATEGIES]
