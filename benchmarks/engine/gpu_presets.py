"""The presets for one card and the embedded world on a GPU, for gpu.py: seconds and peaks of whole iterations."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.gpu_measure import Meter, Record, attempted
from benchmarks.engine.gpu_models import Scale, pipeline
from benchmarks.engine.gpu_recipe import RandomHPSv2, text_parts
from trajsurgery import LeapAlign, tiny
from trajsurgery.cli.train_command import main
from trajsurgery.training.averages import update_averages
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.checks import trial
from trajsurgery.training.components import PromptCache, RunComponents, pipeline_arguments, prepare_pipeline
from trajsurgery.training.presets import presets
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import training_step


def shortened(name: str, scale: Scale) -> Recipe:
    """Return a preset with two images an iteration."""
    large = presets(LeapAlign(alpha=0.3), "outputs/gpu")[name]
    rollout: Any = replace(large.rollout, batch=2)
    if scale.small:
        rollout = replace(rollout, steps=scale.steps[0], size=64)
    return replace(large, rollout=rollout, device=scale.device)


def preset(name: str, scale: Scale, record: Record) -> None:
    """Make the trial and three iterations of two images with random weights and HPSv2.1's architecture."""
    recipe, texts = shortened(name, scale), tuple(str(prompt.text) for prompt in tiny.prompts("train"))[:8]
    reward = RandomHPSv2("ViT-B-32" if scale.small else "ViT-H-14", scale.device)
    pipe = prepare_pipeline(pipeline("flux_1_dev", scale, **text_parts(scale)), recipe)
    world = RunComponents(
        pipe, reward, texts, lambda count, _: [texts[i % 8] for i in range(count)], (Prompt(texts[0], "one"),)
    )
    meter, lines = Meter(scale), list[str]()
    record.add("trial", meter.run(lambda: trial.check_gradient_is_finite(recipe, world, lines.append)))
    record.add("trial says", lines)
    cache = PromptCache(pipe, texts, pipeline_arguments(recipe))
    training = TrainingState.start(recipe, world.module)
    record.add("trained", sum(p.numel() for p in training.parameters))
    record.add("averages alone", meter.run(lambda: update_averages(training.ema, training.local)))
    for number in range(3):
        rows: list[Any] = []
        figures = meter.run(lambda rows=rows: rows.append(training_step(recipe, world, cache, training, 0.55)))
        row = {key: getattr(rows[0], key) for key in ("reward", "loss", "grad_norm", "skipped")}
        record.add(f"iteration {number + 1}, 2 images", figures | row)


def lora_80gb(scale: Scale, record: Record) -> None:
    """The preset lora-80gb on FLUX.1-dev's size."""
    preset("lora-80gb", scale, record)


def full_80gb(scale: Scale, record: Record) -> None:
    """The preset full-80gb on FLUX.1-dev's size."""
    preset("full-80gb", scale, record)


def demo(scale: Scale, record: Record) -> None:
    """The embedded world on the GPU: the whole command, 20 iterations, and what it finds."""
    for world in ("tiny", "tiny:sd3"):

        def run(world: str = world) -> None:
            with tempfile.TemporaryDirectory() as folder:
                recipe = presets(LeapAlign(alpha=0.3), folder)["tiny"]
                evaluation = replace(recipe.evaluation, images=96, pictures=12)
                short = replace(recipe, model=world, device=scale.device, iterations=20, evaluation=evaluation)
                evaluated = main(replace(short, output=Path(folder) / "run"))
                assert evaluated is not None
                lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
                seconds = [line["seconds"] for line in lines if line["kind"] == "iteration"]
                keys = ("reward_before", "reward_after", "rule_before", "rule_after", "skipped", "seconds")
                figures = {key: evaluated[key] for key in keys}
                record.add(
                    world, figures | {"iteration": sorted(seconds)[len(seconds) // 2], "torch": torch.__version__}
                )

        attempted(record, world, run)
