"""The dry run: memory, operations and time of a recipe on real models, without weights or a GPU.

memory_plan.py     `plan_memory`: bytes, operations and seconds of an iteration, part by part
model_costs.py     what a model call, the decode and the reward keep and compute
measure.py         bytes and operations of a piece of work, on fake or real tensors
fake_pipeline.py   a pipeline of real size under fake tensors, from configs
gpu_kernels.py     what CUDA's kernels keep for the backward pass, as shapes
savings.py         changes of a recipe that take less memory
fit.py             `fit`: the cheapest setting that fits a card
table.py           the plan on a terminal
configs/           configs of the models that recipes name

It may import everything up to `training`.
"""

from trajsurgery.dry_run.fake_pipeline import PipelineSpec, find_spec
from trajsurgery.dry_run.memory_plan import MemoryPlan, plan_memory
from trajsurgery.dry_run.table import table

__all__ = ["MemoryPlan", "PipelineSpec", "find_spec", "plan_memory", "table"]
