"""The dry run: what a recipe takes on real models, with neither weights nor a GPU."""

from trajsurgery.memory.estimate import MemoryPlan, plan_memory
from trajsurgery.memory.spec import Spec, spec
from trajsurgery.memory.table import table

__all__ = ["MemoryPlan", "Spec", "plan_memory", "spec", "table"]
