"""Table 2 on the embedded world: every direct-gradient method under one budget, on five seeds.

    python -m benchmarks.study.study

Each method gets the same iterations, batch and optimiser. Its learning rate is chosen once, by the reward on validation
prompts and a seed of their own, from a grid that all methods share (extended by a step where the best rate lies at its
edge). Then it runs on every seed, with the prompts and noise that all methods of a seed share; its held-out images are
graded by the reward, two further scorers and the rules, paired with the untuned model's image by image.

Writes study.json, study.md, study.png and study_samples.png to results/, from the seeds that are finished for all
methods, and study_rates.json, the figures of every rate that was tried. A high rate may buy reward that the rules do
not see: `--by rules` chooses rates by the rules and writes study_by_rules.json and so on; `--rate 3e-5` gives one rate
to all methods and writes study_rate_3e-05.json and so on. Finished runs are read and interrupted ones continue: repeat
the command after any interruption. About two hours on 2 cores. cost.py measures time and memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from benchmarks.provenance import provenance
from benchmarks.study.methods import METHODS, Budget, rates_to_try
from benchmarks.study.pictures import draw, draw_samples
from benchmarks.study.report import round_numbers, write_report
from benchmarks.study.runs import Task, has_scores, is_finished, load_record, load_scores
from benchmarks.study.seed_statistics import mean_figures
from benchmarks.study.worker_pool import run_tasks
from trajsurgery.errors import SurgeryError

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Methods, seeds and budget."""

    methods: tuple[str, ...] = tuple(METHODS)
    """In the table's order."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    """The learning rates that every method tries; the grid continues in both directions."""
    validation: int = 100
    """The seed on which the rate is chosen."""
    by: Literal["reward", "rules"] = "reward"
    """What chooses the rate on the validation prompts; with rules the files are study_by_rules.json, ..."""
    chosen: Path | None = None
    """A study_rates.json whose rates are used instead of choosing them."""
    rate: float | None = None
    """One rate for all methods instead of choosing them; the files are study_rate_3e-05.json, ..."""
    stages: tuple[int, ...] = (75, 150, 225)
    """Iterations after which held-out images are made (Fig. 5); the last is the budget."""
    images: int = 480
    """Held-out images of a run, spread evenly over the six categories."""
    workers: int = 2
    """Processes side by side, one thread each; 1 on a busy machine."""
    report: bool = False
    """Only write the table and pictures of the finished runs."""
    output: Path = RESULTS
    runs: Path = Path("outputs/study")
    """Folder of the runs; keep it to continue."""

    @property
    def budget(self) -> Budget:
        """What all runs have in common."""
        return Budget(self.stages, self.images, self.runs)


def load_trials(options: Options, name: str) -> dict[float, dict[str, float]]:
    """Return {rate: figures of the validation images} of the finished trials; no figures if a run diverged."""
    figures_by_rate: dict[float, dict[str, float]] = {}
    while True:
        values = {rate: trial_value(line, options.by) for rate, line in figures_by_rate.items()}
        tasks = {
            rate: options.budget.trial(name, rate, options.validation) for rate in rates_to_try(values, options.rates)
        }
        new = {rate: task for rate, task in tasks.items() if rate not in figures_by_rate and is_finished(task)}
        if not new:
            return figures_by_rate
        for rate, task in new.items():
            figures_by_rate[rate] = (
                mean_figures(load_scores(task.folder, options.stages[-1])) if has_scores(task) else {}
            )


def trial_value(line: dict[str, float], figure: str) -> float:
    """Return a trial's figure, or minus infinity if it diverged."""
    return line.get(figure, -math.inf)


def best_rate(figures_by_rate: dict[float, dict[str, float]], figure: str = "reward") -> float:
    """Return the rate with the highest figure.

    Raises:
        SurgeryError: all diverged.
    """
    if not any(figures_by_rate.values()):
        raise SurgeryError(
            f"all rates that were tried diverged, {sorted(figures_by_rate)}: pass smaller ones, --rates 1e-6 3e-6."
        )
    return max(figures_by_rate, key=lambda rate: trial_value(figures_by_rate[rate], figure))


def choose_rates(options: Options) -> dict[str, dict[str, Any]]:
    """Return each method's trials, its rate, and the one with the best rules; None while trials are missing."""
    if options.rate is not None:
        return {name: {"chosen": options.rate} for name in options.methods}
    if options.chosen is not None:
        rates = json.loads(options.chosen.read_text())["rates"]
        return {name: {"chosen": rates[name]["chosen"]} for name in options.methods}
    choices: dict[str, dict[str, Any]] = {}
    for name in options.methods:
        trials = load_trials(options, name)
        left = (
            set(rates_to_try({rate: trial_value(line, options.by) for rate, line in trials.items()}, options.rates))
            - trials.keys()
        )
        choices[name] = {
            "tried": {f"{rate:g}": line for rate, line in sorted(trials.items())},
            "left": sorted(left),
            "chosen": None if left else best_rate(trials, options.by),
            "by_rules": None if left else best_rate(trials, "rules"),
        }
    return choices


def chooses_rates(options: Options) -> bool:
    """Return whether this study chooses the rates."""
    return options.chosen is None and options.rate is None


def file_stem(options: Options) -> str:
    """Return the stem of the result files."""
    if options.rate is not None:
        return f"study_rate_{options.rate:g}"
    return "study" if options.by == "reward" else "study_by_rules"


def ordered_tasks(options: Options) -> Iterator[Task]:
    """Yield trials first, then seed by seed all methods, so that the table is balanced at any time."""
    choices, budget = choose_rates(options), options.budget
    if chooses_rates(options):
        yield budget.base(options.validation, "validation")
        trials = [
            (rate, name) for name, line in choices.items() for rate in (*map(float, line["tried"]), *line["left"])
        ]
        for rate, name in sorted(trials, key=lambda one: one[0]):
            yield budget.trial(name, rate, options.validation)
    for seed in options.seeds:
        yield budget.base(seed)
        for name, line in choices.items():
            if line["chosen"] is not None:
                yield budget.run(name, line["chosen"], seed)


def describe_task(done: Task) -> str:
    """Return a line about a finished run."""
    if not has_scores(done):
        return load_record(done)["diverged"]
    line = mean_figures(load_scores(done.folder, done.stages[-1]))
    return f"reward {line['reward']:.4f} rules {line['rules']:.3f}"


def tasks_by_method(options: Options) -> dict[str, dict[int, Task]]:
    """Return {method: {seed: its run}} of the methods with a chosen rate, the base first."""
    tasks = {"base": {seed: options.budget.base(seed) for seed in options.seeds}}
    for name, line in choose_rates(options).items():
        rate = line["chosen"]
        tasks[name] = {} if rate is None else {seed: options.budget.run(name, rate, seed) for seed in options.seeds}
    return tasks


def main(options: Options) -> int:
    """Run what is not finished, then write the results."""
    if options.rate is not None and (options.chosen is not None or options.by != "reward"):
        raise SurgeryError("--rate gives all methods one rate: drop --chosen and --by, which choose one for each.")
    complete = options.report or run_tasks(
        lambda: list(ordered_tasks(options)), options.runs, options.workers, describe_task
    )
    tasks = tasks_by_method(options)
    options.output.mkdir(parents=True, exist_ok=True)
    name, rates = file_stem(options), choose_rates(options)
    if chooses_rates(options):
        base = options.budget.base(options.validation, "validation")
        untuned = mean_figures(load_scores(base.folder, 0)) if is_finished(base) else {}
        record = {**provenance(), "validation seed": options.validation, "untuned": untuned, "rates": rates}
        (options.output / f"{name}_rates.json").write_text(json.dumps(round_numbers(record), indent=1) + "\n")
    results = write_report(tasks, rates, options.output, name)
    if results is not None:
        draw(results, options.output / f"{name}.png")
        draw_samples(tasks, results["seeds"][0], options.output / f"{name}_samples.png")
    return 0 if complete else 130


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
