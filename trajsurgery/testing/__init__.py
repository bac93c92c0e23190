"""For your own tests: `check_gradient` proves a plan or a method; strategies draw plans, fields, trajectories, methods.

The strategies need hypothesis (the `dev` extra), which is imported when one of them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trajsurgery.testing.check import Proof as Proof
    from trajsurgery.testing.check import check_gradient as check_gradient
    from trajsurgery.testing.strategies import INTERPOLANTS as INTERPOLANTS
    from trajsurgery.testing.strategies import MOVES as MOVES
    from trajsurgery.testing.strategies import factors as factors
    from trajsurgery.testing.strategies import fields as fields
    from trajsurgery.testing.strategies import methods as methods
    from trajsurgery.testing.strategies import plans as plans
    from trajsurgery.testing.strategies import sigmas as sigmas
    from trajsurgery.testing.strategies import trajectories as trajectories
    from trajsurgery.testing.velocity import MLP as MLP
    from trajsurgery.testing.velocity import Gaussian as Gaussian

_HOME = {
    "check": ("Proof", "check_gradient"),
    "strategies": ("INTERPOLANTS", "MOVES", "factors", "fields", "methods", "plans", "sigmas", "trajectories"),
    "velocity": ("MLP", "Gaussian"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'trajsurgery.testing' has no attribute {name!r}")
    return getattr(import_module(f"trajsurgery.testing.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULE]
