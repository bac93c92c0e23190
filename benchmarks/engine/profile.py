"""Profile training iterations: where the seconds go between a recipe and its bare model calls.

    python -m benchmarks.engine.profile

Of the demo (the embedded Flux, its own recipe) and of overhead.py's Flux with 18 M parameters, decoder and a reward.
torch.profiler records ranges around functions of the library, which are put there from outside for the time of the
profile. A range's seconds are its own: those of ranges inside it are theirs. They are the host's; on a GPU what it
waits for is in "host waits". Between profiled iterations as many are timed without the profiler. Writes profile.json
and profile.md to results/. About 3 minutes on one core.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.engine.leapalign_iteration import IterationBench
from benchmarks.engine.leapalign_iteration import Options as BenchOptions
from benchmarks.engine.overhead import time_run
from benchmarks.provenance import provenance
from trajsurgery import LeapAlign
from trajsurgery.pipelines import call_record, denoising_loop, replay
from trajsurgery.training import components, objective, step_gradient, training_loop
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Objective, Rollout

PREFIX = "trajsurgery: "
REST = "prompts, draws, the rest"
STAGES = (
    "rollout: model calls",
    "rollout: model calls with gradient",
    "rollout: the pipeline's loop",
    "rollout: the sampler's steps",
    "surgery",
    "decode",
    "reward",
    "objective and checks",
    "backward: reward and decoder",
    "backward: transformer",
    "clipping and optimiser",
    "moving averages",
    "logging",
    "host waits",
    REST,
)
_MODEL, _GRADIENT, _LOOP, _SAMPLER, _SURGERY, _DECODE, _REWARD, _CHECKS = STAGES[:8]
_BACK_REWARD, _BACK_MODEL, _OPTIMISER, _AVERAGES, _LOGGING, _WAITS = STAGES[8:14]


@dataclass(frozen=True)
class Options:
    """Length of the measurement."""

    iterations: int = 8
    """Of each model, profiled; as many more are timed without the profiler."""
    warmup: int = 2
    threads: int = 1
    output: Path = Path(__file__).parent / "results"


@dataclass
class Subject:
    """A run to profile."""

    recipe: Recipe
    world: components.RunComponents
    embeddings: Any
    """texts -> the pipeline's arguments, as `PromptCache`."""


def demo(output: Path) -> Subject:
    """Return the run of `make demo`."""
    recipe = replace(presets(LeapAlign(alpha=0.3), str(output))["tiny"], device="cpu")
    world = components.load(recipe)
    return Subject(recipe, world, components.PromptCache(world.pipe, ()))


def larger(output: Path) -> Subject:
    """Return a run of overhead.py's pipeline, which takes prompts that are encoded already."""
    bench = IterationBench(BenchOptions(batch=2))
    rollout = Rollout(steps=25, batch=2, size=bench.side)
    recipe = Recipe(
        method=LeapAlign(), rollout=rollout, objective=Objective(threshold=10.0), output=output, device="cpu"
    )
    pipe = components.prepare_pipeline(bench.pipe, recipe)
    world = components.RunComponents(
        pipe, lambda images, _: bench.reward(images), ("a prompt",), lambda count, _: ["a prompt"] * count, ()
    )
    return Subject(recipe, world, lambda _: {"prompt_embeds": bench.prompts, "pooled_prompt_embeds": bench.pooled})


def ranged(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function in a range of the profiler."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + stage):
            return function(*args, **kwargs)

    return call


def _model_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    with_gradient, without = ranged(_GRADIENT, forward), ranged(_MODEL, forward)
    return lambda *args, **kwargs: (with_gradient if torch.is_grad_enabled() else without)(*args, **kwargs)


@contextmanager
def ranges(pipe: Any) -> Generator[None]:
    """Put ranges around the stages' functions, inside the block."""
    loop, record = denoising_loop.DenoisingLoop, call_record.CallRecord
    functions: Iterable[tuple[Any, str, str]] = (
        (type(pipe), "__call__", _LOOP),
        (FlowMatchEulerDiscreteScheduler, "step", _SAMPLER),
        (FlowMatchEulerDiscreteScheduler, "set_timesteps", _SAMPLER),
        (step_gradient, "_sample", _SURGERY),
        *(
            (loop, name, _SURGERY)
            for name in ("__init__", "__enter__", "__exit__", "_set_timesteps", "_begin", "_step")
        ),
        *((record, name, _SURGERY) for name in ("watch", "trim")),
        *((call_record, name, _SURGERY) for name in ("_cache_of", "_copied")),
        (call_record.TimestepInputs, "note", _SURGERY),
        (denoising_loop, "_copy_arguments", _SURGERY),
        (replay.Replay, "_run", _SURGERY),
        (pipe.vae, "decode", _DECODE),
        *((objective, name, _CHECKS) for name in ("weights", "loss")),
        (step_gradient, "first_not_finite", _CHECKS),
        (objective, "cotangents", _BACK_REWARD),
        (torch.autograd, "backward", _BACK_MODEL),
        (torch.nn.utils, "clip_grad_norm_", _OPTIMISER),
        (training_loop, "_step", _OPTIMISER),
        (training_loop, "update_averages", _AVERAGES),
        (Log, "append", _LOGGING),
        *((Tensor, name, _WAITS) for name in ("item", "tolist", "__bool__", "__float__", "__int__")),
        *((torch, name, _WAITS) for name in ("equal",)),
    )
    with ExitStack() as stack:
        for owner, name, stage in functions:
            stack.enter_context(mock.patch.object(owner, name, ranged(stage, getattr(owner, name))))
        forward = _model_call(pipe.transformer.forward)
        stack.enter_context(mock.patch.object(pipe.transformer, "forward", forward))
        yield


def own_seconds(events: Iterable[Any]) -> dict[str, float]:
    """Return the seconds of each stage that are in no range inside its own, of one thread's ranges."""
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in events if e.name.startswith(PREFIX)]
    seconds, open_spans = defaultdict[str, float](float), list[tuple[float, str]]()
    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_spans and open_spans[-1][0] <= start:
            open_spans.pop()
        if open_spans:
            seconds[open_spans[-1][1]] -= (end - start) / 1e6
        seconds[name.removeprefix(PREFIX)] += (end - start) / 1e6
        open_spans.append((end, name.removeprefix(PREFIX)))
    return dict(seconds)


def measure(subject: Subject, options: Options) -> dict[str, Any]:
    """Run and profile iterations of a subject."""
    recipe, world = subject.recipe, subject.world
    world = replace(world, reward=ranged(_REWARD, world.reward))
    training, log = TrainingState.start(recipe, world.module), Log(recipe.output / METRICS)
    lambda_ = float(recipe.objective.threshold or 0)

    def iteration() -> None:
        log.append(asdict(training_loop.training_step(recipe, world, subject.embeddings, training, lambda_)))

    for _ in range(options.warmup):
        iteration()
    plain, processor, rows = list[float](), list[float](), list[dict[str, float]]()
    for _ in range(options.iterations):
        seconds, work = time_run(iteration, lambda: None)
        plain.append(seconds)
        processor.append(work)
        with ranges(world.pipe), profile(activities=[ProfilerActivity.CPU]) as profiler:
            ranged(REST, iteration)()
        rows.append(own_seconds(profiler.events() or ()))
    totals = [sum(row.values()) for row in rows]
    return {
        "batch": recipe.rollout.batch,
        "steps": recipe.rollout.steps,
        "parameters": sum(p.numel() for p in world.module.parameters()),
        "seconds": plain,
        "processor_seconds": processor,
        "profiled": totals,
        "stages": {stage: _spread([row.get(stage, 0.0) for row in rows], totals) for stage in STAGES},
    }


def _spread(seconds: list[float], totals: list[float]) -> dict[str, float]:
    """Return median and quartiles of a stage's seconds, and its share of all iterations."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"low": low, "median": middle, "high": high, "share": sum(seconds) / sum(totals)}


def table(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    machine, versions = record["machine"], record["versions"]
    lines = [
        "# Where an iteration's seconds go\n",
        f"`{record['command']}`, commit {record['commit']}; {machine['processor']}, {machine['threads']} thread, load "
        f"{record['load']}; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    for name, result in record["subjects"].items():
        keys = ("seconds", "processor_seconds", "profiled")
        plain, processor, profiled = (statistics.median(result[key]) for key in keys)
        lines += [
            f"\n## {name}\n",
            f"{result['parameters'] / 1e6:.1f} M parameters, batch {result['batch']}, {result['steps']} steps; "
            f"{len(result['seconds'])} iterations, medians: {plain:.3f} s, {processor:.3f} s of the processor; "
            f"{profiled:.3f} s under the profiler.\n",
            "| stage | seconds, median (quartiles) | share |",
            "|---|---|---|",
        ]
        for stage, s in result["stages"].items():
            lines.append(f"| {stage} | {s['median']:.4f} ({s['low']:.4f} to {s['high']:.4f}) | {s['share']:.1%} |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    """Profile both, print and write the table."""
    torch.set_num_threads(options.threads)
    subjects: dict[str, Callable[[Path], Subject]] = {"The demo": demo, "Flux with 18 M parameters": larger}
    record: dict[str, Any] = {**provenance(), "subjects": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in subjects.items():
            record["subjects"][name] = measure(make(Path(folder) / name), options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "profile.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "profile.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
