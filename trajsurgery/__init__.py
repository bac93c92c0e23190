"""trajsurgery: say which edges of a flow-matching sampler's trajectory let the reward gradient pass.

Names are imported when they are first used, so that `import trajsurgery` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trajsurgery.errors import PlanError, RecipeError, RewardError, SamplerError, SurgeryError
    from trajsurgery.interpolant import Interpolant, Polynomial, RectifiedFlow, Trigonometric
    from trajsurgery.methods import DRaFTLV, DRTune, LeapAlign, ReFL, draft_lv, drtune, leapalign, leaps, refl
    from trajsurgery.plan import Plan, latent, noise, recorded
    from trajsurgery.surgery import apply, backward, distances, rollout, sample, values
    from trajsurgery.trajectory import Trajectory

_HOME = {
    "errors": ("PlanError", "RecipeError", "RewardError", "SamplerError", "SurgeryError"),
    "interpolant": ("Interpolant", "Polynomial", "RectifiedFlow", "Trigonometric"),
    "methods": ("DRTune", "DRaFTLV", "LeapAlign", "ReFL", "draft_lv", "drtune", "leapalign", "leaps", "refl"),
    "plan": ("Plan", "latent", "noise", "recorded"),
    "surgery": ("apply", "backward", "distances", "rollout", "sample", "values"),
    "trajectory": ("Trajectory",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [*_MODULE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'trajsurgery' has no attribute {name!r}")
    value = getattr(import_module(f"trajsurgery.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULE]
