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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trajsurgery.testing.gradient_proof import Proof as Proof
    from trajsurgery.testing.gradient_proof import check_gradient as check_gradient
    from trajsurgery.testing.strategies import INTERPOLANTS as INTERPOLANTS
    from trajsurgery.testing.strategies import MOVES as MOVES
    from trajsurgery.testing.strategies import factors as factors
    from trajsurgery.testing.strategies import fields as fields
    from trajsurgery.testing.strategies import methods as methods
    from trajsurgery.testing.strategies import plans as plans
    from trajsurgery.testing.strategies import sigmas as sigmas
    from trajsurgery.testing.strategies import trajectories as trajectories
    from trajsurgery.testing.velocity_fields import MLP as MLP
    from trajsurgery.testing.velocity_fields import Gaussian as Gaussian

_HOME = {
    "gradient_proof": ("Proof", "check_gradient"),
    "strategies": ("INTERPOLANTS", "MOVES", "factors", "fields", "methods", "plans", "sigmas", "trajectories"),
    "velocity_fields": ("MLP", "Gaussian"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'trajsurgery.testing' has no attribute {name!r}")
    return getattr(import_module(f"trajsurgery.testing.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULE]
