"""trajsurgery: say which edges of a flow-matching sampler's trajectory let the reward gradient pass.

Names are imported when they are first used, so that `import trajsurgery` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trajsurgery.dry_run import MemoryPlan as MemoryPlan
    from trajsurgery.dry_run import plan_memory as plan_memory
    from trajsurgery.errors import DivergedError as DivergedError
    from trajsurgery.errors import OutOfMemoryError as OutOfMemoryError
    from trajsurgery.errors import OutputError as OutputError
    from trajsurgery.errors import PlanError as PlanError
    from trajsurgery.errors import RecipeError as RecipeError
    from trajsurgery.errors import RewardError as RewardError
    from trajsurgery.errors import SamplerError as SamplerError
    from trajsurgery.errors import SurgeryError as SurgeryError
    from trajsurgery.methods import *  # noqa: F403
    from trajsurgery.pipelines.operate import Surgery as Surgery
    from trajsurgery.pipelines.operate import operate as operate
    from trajsurgery.pipelines.pipeline_field import PipelineField as PipelineField
    from trajsurgery.plans.interpolants import Interpolant as Interpolant
    from trajsurgery.plans.interpolants import Polynomial as Polynomial
    from trajsurgery.plans.interpolants import RectifiedFlow as RectifiedFlow
    from trajsurgery.plans.interpolants import Trigonometric as Trigonometric
    from trajsurgery.plans.per_sample import PerSample as PerSample
    from trajsurgery.plans.plan import Plan as Plan
    from trajsurgery.plans.plan import latent as latent
    from trajsurgery.plans.plan import noise as noise
    from trajsurgery.plans.plan import recorded as recorded
    from trajsurgery.plans.step_gain import StepGain as StepGain
    from trajsurgery.runs.callbacks import TrainerCallback as TrainerCallback
    from trajsurgery.runs.trainer import Trainer as Trainer
    from trajsurgery.surgery.api import apply as apply
    from trajsurgery.surgery.api import backward as backward
    from trajsurgery.surgery.api import distances as distances
    from trajsurgery.surgery.api import rollout as rollout
    from trajsurgery.surgery.api import sample as sample
    from trajsurgery.surgery.api import values as values
    from trajsurgery.surgery.trajectory import Trajectory as Trajectory
    from trajsurgery.training.recipe import Recipe as Recipe
    from trajsurgery.training.settings import Decoder as Decoder
    from trajsurgery.training.settings import Evaluation as Evaluation
    from trajsurgery.training.settings import Guards as Guards
    from trajsurgery.training.settings import Objective as Objective
    from trajsurgery.training.settings import Optimiser as Optimiser
    from trajsurgery.training.settings import Rollout as Rollout
    from trajsurgery.training.settings import Trained as Trained

_NAMES = {
    "errors": "DivergedError OutOfMemoryError OutputError PlanError RecipeError RewardError SamplerError SurgeryError",
    "plans.interpolants": "Interpolant Polynomial RectifiedFlow Trigonometric",
    "plans.plan": "Plan latent noise recorded",
    "plans.per_sample": "PerSample",
    "plans.step_gain": "StepGain",
    "surgery.api": "apply backward distances rollout sample values",
    "surgery.trajectory": "Trajectory",
    "pipelines.operate": "Surgery operate",
    "pipelines.pipeline_field": "PipelineField",
    "methods": "AlignProp DRTune DRaFT1 DRaFTK DRaFTLV FlowBPBridge FlowBPLagrange FlowBPSparse LeapAlign ReFL ReNO "
    "SRPO WholeTrajectory draft_k draft_lv drtune flowbp_bridge flowbp_lagrange flowbp_sparse leapalign leaps refl "
    "reno srpo whole_trajectory",
    "dry_run": "MemoryPlan plan_memory",
    "runs.callbacks": "TrainerCallback",
    "runs.trainer": "Trainer",
    "training.recipe": "Recipe",
    "training.settings": "Decoder Evaluation Guards Objective Optimiser Rollout Trained",
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names.split()}
_PACKAGES = ("testing", "tiny")
_RENAMED: dict[str, tuple[str, str]] = {}
"""{former name: (its name now, the minor version without it)}: they work for one minor version, with a warning."""

__version__ = "0.1.0"
__all__ = [*_MODULE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"trajsurgery.{name}")
    if name in _RENAMED:
        from warnings import warn

        now, last = _RENAMED[name]
        text = f"trajsurgery.{name} is now trajsurgery.{now}; the former name works until {last}"
        warn(text, DeprecationWarning, stacklevel=2)
        name = now
    if name not in _MODULE:
        from trajsurgery.errors import suggest

        raise AttributeError(f"module 'trajsurgery' has no attribute {name!r}.{suggest(name, __all__)}")
    value = getattr(import_module(f"trajsurgery.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULE, *_PACKAGES]
