"""Write study.json and study.md from the finished runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.study.findings import table_2_findings
from benchmarks.study.runs import (
    Task,
    diverged_runs,
    has_scores,
    is_finished,
    load_iterations,
    load_record,
    load_scores,
)
from benchmarks.study.seed_statistics import finished_seeds, mean_figures, rank_methods, summarise_runs
from benchmarks.study.tables import render_document
from trajsurgery.errors import SurgeryError

BIN = 15
"""Iterations whose training rewards and gradient norms are averaged."""


def stage_figures(tasks: Mapping[str, Mapping[int, Task]]) -> dict[str, dict[int, dict[int, dict[str, float]]]]:
    """Return {name: {seed: {iteration: figures}}} of the finished runs that did not diverge."""
    return {
        name: {
            seed: {stage: mean_figures(load_scores(task.folder, stage)) for stage in task.stages}
            for seed, task in tasks_by_seed.items()
            if has_scores(task)
        }
        for name, tasks_by_seed in tasks.items()
    }


def last_stage(
    figures_by_stage: Mapping[str, Mapping[int, Mapping[int, dict[str, float]]]],
) -> dict[str, dict[int, dict[str, float]]]:
    """Return {name: {seed: figures}} after the last stage."""
    return {name: {seed: stages[max(stages)] for seed, stages in of.items()} for name, of in figures_by_stage.items()}


def training_curves(task: Task) -> dict[str, list[float]]:
    """Return the rollouts' reward and the gradient norm before clipping, averaged over bins of iterations."""
    lines = load_iterations(task.folder)
    bins = [lines[i : i + BIN] for i in range(0, len(lines), BIN)]
    return {key: [_mean([line[key] for line in part]) for part in bins] for key in WATCHED}


def _mean(values: list[float | None]) -> float:
    """Return the mean over the iterations that were not skipped; skipped ones have None."""
    present = [value for value in values if value is not None]
    return round(statistics.fmean(present), 5) if present else math.nan


WATCHED = ("reward", "grad_norm", "closed", "weight")


def check_one_world(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fingerprint of the weights that all runs were made with, in a list.

    Raises:
        SurgeryError: there are several.
    """
    worlds = sorted({record["world"] for record in records})
    if len(worlds) > 1:
        raise SurgeryError(
            f"runs of the worlds {', '.join(worlds)} are not to be compared: pass --runs another folder."
        )
    return worlds


def collect_results(tasks: Mapping[str, Mapping[int, Task]], rates: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of study.json.

    Args:
        tasks: {method: {seed: its task}}, with `base`.
        rates: how the rates were chosen, by method.
    """
    figures_by_stage = stage_figures(tasks)
    runs, names = last_stage(figures_by_stage), [name for name in tasks if name != "base"]
    seeds = finished_seeds(runs, names)
    all_seeds = sorted(next(iter(tasks.values())))
    finished_tasks = [task for of in tasks.values() for task in of.values() if is_finished(task)]
    records = [load_record(task) for task in finished_tasks]
    worlds = check_one_world(records)
    recipe = {name: value for name, value in records[-1]["recipe"].items() if name not in ("output", "method", "seed")}
    return {
        **provenance(),
        "commits": sorted({record["commit"] for record in records}),
        "worlds": worlds,
        "complete": seeds == all_seeds,
        "seeds": seeds,
        "recipe": recipe,
        "rates": rates,
        "summary": summarise_runs(runs, seeds, ["base", *names]) if seeds else {},
        "ranking": rank_methods(runs, seeds, names, "reward") if seeds else [],
        "findings": [one.to_dict() for one in table_2_findings(runs, seeds, names)] if seeds else [],
        "runs": figures_by_stage,
        "training": {
            name: {seed: training_curves(task) for seed, task in of.items() if has_scores(task)}
            for name, of in tasks.items()
            if name != "base"
        },
        "diverged": diverged_runs(records),
        "skipped": {
            "/".join(task.folder.parts[-3:]): record["skipped"]
            for task, record in zip(finished_tasks, records)
            if record["skipped"]
        },
    }


def write_report(
    tasks: Mapping[str, Mapping[int, Task]], rates: Mapping[str, Any], output: Path, stem: str = "study"
) -> dict[str, Any] | None:
    """Write study.json and study.md; return the record, or None if no seed is finished for all methods."""
    record = collect_results(tasks, rates)
    if not record["seeds"]:
        print("no seed is finished for all methods yet: there is nothing to write")
        return None
    names = [name for name in tasks if name != "base"]
    runs = last_stage(record["runs"])
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{stem}.json").write_text(json.dumps(round_numbers(record), indent=1) + "\n")
    text = render_document(record, table_2_findings(runs, record["seeds"], names), load_costs())
    (output / f"{stem}.md").write_text(text)
    return record


def load_costs() -> dict[str, Any]:
    """Return {method: seconds and peak bytes of an iteration}, as cost.py last measured them."""
    path = Path(__file__).parent / "results" / "study_cost.json"
    return json.loads(path.read_text())["methods"] if path.exists() else {}


def round_numbers(value: Any) -> Any:
    """Round all numbers to six digits."""
    if isinstance(value, Mapping):
        return {str(name): round_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [round_numbers(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
