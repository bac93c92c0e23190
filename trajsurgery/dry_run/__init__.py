"""The dry run: what a recipe takes on real models, with neither weights nor a GPU."""

from trajsurgery.dry_run.estimate import MemoryPlan, plan_memory
from trajsurgery.dry_run.fake_pipeline import Spec, spec
from trajsurgery.dry_run.table import table

__all__ = ["MemoryPlan", "Spec", "plan_memory", "spec", "table"]
