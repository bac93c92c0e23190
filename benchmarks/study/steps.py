"""Which of the sampler's steps carry what a method learned: tuned weights at some steps, untuned ones at the rest.

    python -m benchmarks.study.steps

ReFL's gradient reaches the last 11 of 25 steps, DRaFT-LV's the last one, LeapAlign's and DRTune's all. If what a step
teaches stayed with its time, the tuned weights of the first two would gain nothing at the 14 steps before; if it
spreads, methods that reach early steps have no head start. Takes the runs that study.py made with rates chosen by the
rules, 480 held-out images each, from the noise that they were evaluated with. Finished evaluations in the folder of
runs are read. Writes study_steps.json and study_steps.png to results/. About four minutes on 2 cores.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro
from matplotlib.figure import Figure
from rich.progress import track

from benchmarks.provenance import provenance
from benchmarks.study.methods import Budget
from benchmarks.study.pictures import COLOURS, draw_interval
from benchmarks.study.report import check_one_world, round_numbers
from benchmarks.study.runs import Task, has_scores, load_record, load_scores
from benchmarks.study.seed_statistics import interval, mean_figures
from trajsurgery.errors import SurgeryError
from trajsurgery.evaluation.held_out import HeldOutScores, evaluate
from trajsurgery.methods import ReFL
from trajsurgery.training import components
from trajsurgery.training.checkpoints.checkpoint import saved_tensors
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
PARTS = {"early": range(ReFL().last + 1, 26), "late": range(1, ReFL().last + 1)}
"""The steps before those that ReFL trains, and those that it trains."""
PANELS = ("reward", "rules", "position", "attribute binding")


@dataclass(frozen=True)
class Options:
    """The study's runs."""

    methods: tuple[str, ...] = ("refl", "draft_lv", "drtune", "leapalign")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: Path = RESULTS / "study_by_rules_rates.json"
    """File with the chosen rates."""
    stages: tuple[int, ...] = (75, 150, 225)
    images: int = 480
    workers: int = 2
    output: Path = RESULTS
    runs: Path = Path("outputs/study")


def evaluate_mixed(recipe: Recipe, tuned: Sequence[torch.Tensor], at: range) -> HeldOutScores:
    """Evaluate a model that has the tuned weights when it is called at these t, and the untuned ones at others."""
    torch.set_num_threads(recipe.threads)
    run = components.load(recipe)
    parameters = [p for p in run.module.parameters() if p.requires_grad]
    untuned = [p.detach() for p in parameters]

    def choose(module: torch.nn.Module, _: Any, inputs: Mapping[str, torch.Tensor]) -> None:
        sigma = float(inputs["timestep"][0])
        t = sum(float(one) < sigma + 1e-6 for one in run.pipe.scheduler.sigmas[:-1])
        for parameter, value in zip(parameters, tuned if t in at else untuned, strict=True):
            parameter.data = value

    with run.module.register_forward_pre_hook(choose, with_kwargs=True):
        return evaluate(recipe, run)


def load_or_evaluate(task: Task, name: str) -> HeldOutScores:
    """Return the scores of a finished run's averaged weights, used at one part of the steps."""
    path = task.folder / f"steps_{name}.pt"
    if not path.exists():
        averages = list(saved_tensors(task.folder, "averages").values())
        scores = evaluate_mixed(task.recipe, averages, PARTS[name])
        write_atomically(path, lambda partial: torch.save(scores.to_dict(), partial))
    return HeldOutScores.from_dict(torch.load(path, weights_only=True))


def tasks_by_method(options: Options) -> dict[str, dict[int, Task]]:
    """Return {method: {seed: its run}}.

    Raises:
        SurgeryError: one is missing, or they are of several worlds.
    """
    budget, rates = Budget(options.stages, options.images, options.runs), json.loads(options.rates.read_text())["rates"]
    tasks = {
        name: {seed: budget.run(name, rates[name]["chosen"], seed) for seed in options.seeds}
        for name in options.methods
    }
    whole = [*(budget.base(seed) for seed in options.seeds), *(task for of in tasks.values() for task in of.values())]
    missing = [str(task.folder) for task in whole if not has_scores(task)]
    if missing:
        raise SurgeryError(
            f"not trained yet: {', '.join(missing)}. Run `python -m benchmarks.study.study --by rules` first, "
            "or pass --runs."
        )
    check_one_world([load_record(task) for task in whole])
    return tasks


def collect_gains(options: Options, tasks: Mapping[str, Mapping[int, Task]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {method: {part, or all: {figure: its gain over the base by seed, and the interval}}}."""
    budget = Budget(options.stages, options.images, options.runs)
    base = {seed: mean_figures(load_scores(budget.base(seed).folder, 0)) for seed in options.seeds}
    gains_by_method: dict[str, dict[str, dict[str, Any]]] = {}
    for name, tasks_by_seed in tasks.items():
        figures_by_part = {
            p: {seed: mean_figures(load_or_evaluate(task, p)) for seed, task in tasks_by_seed.items()} for p in PARTS
        }
        figures_by_part["all"] = {
            seed: mean_figures(load_scores(task.folder, options.stages[-1])) for seed, task in tasks_by_seed.items()
        }
        gains_by_method[name] = {p: {} for p in figures_by_part}
        for p, figure in itertools.product(figures_by_part, next(iter(base.values()))):
            values = [figures_by_part[p][seed][figure] - base[seed][figure] for seed in options.seeds]
            gains_by_method[name][p][figure] = {**interval(values).to_dict(), "by seed": values}
    return gains_by_method


def draw(gains_by_method: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw a panel for each figure: every method tuned at all steps, at the early and at the late ones."""
    figure = Figure(figsize=(15, 1.1 * len(gains_by_method) + 1.6), layout="constrained")
    words = {"all": "all steps", "early": "steps 25 to 12", "late": "steps 11 to 1"}
    rows = [(name, p) for name in reversed(gains_by_method) for p in ("late", "early", "all")]
    for axes, key in zip(figure.subplots(1, len(PANELS)), PANELS):
        for place, (name, p) in enumerate(rows):
            values = gains_by_method[name][p][key]["by seed"]
            draw_interval(axes, interval(values), values, place, COLOURS[name])
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.set(title=key, yticks=range(len(rows)))
        axes.set_yticklabels([f"{name}, {words[p]}" for name, p in rows] if key == PANELS[0] else [])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, axis="x")
    figure.suptitle("gain over the untuned model of tuned weights at some of the steps; dots: seeds; bar: 95% interval")
    figure.savefig(path, dpi=120)


def main(options: Options) -> int:
    """Evaluate what is missing, then write."""
    tasks = tasks_by_method(options)
    pairs = [(task, p) for of in tasks.values() for task in of.values() for p in PARTS]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for _ in track(pool.map(load_or_evaluate, *zip(*pairs)), "images", len(pairs)):
            pass
    record = {**provenance(), "seeds": options.seeds, "gains": collect_gains(options, tasks)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "study_steps.json").write_text(json.dumps(round_numbers(record), indent=1) + "\n")
    draw(record["gains"], options.output / "study_steps.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
