"""What is committed of the study: study.json and study.md, from the runs that are finished."""

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
    """{name: {seed: {iteration: figures}}} of finished tasks that did not diverge."""
    return {
        name: {
            seed: {stage: mean_figures(load_scores(task.folder, stage)) for stage in task.stages}
            for seed, task in of.items()
            if has_scores(task)
        }
        for name, of in tasks.items()
    }


def last_stage(
    found: Mapping[str, Mapping[int, Mapping[int, dict[str, float]]]],
) -> dict[str, dict[int, dict[str, float]]]:
    """{name: {seed: figures}} after the last stage."""
    return {name: {seed: at[max(at)] for seed, at in of.items()} for name, of in found.items()}


def training_curves(task: Task) -> dict[str, list[float]]:
    """The rollouts' reward and the gradient's norm before clipping, averaged over bins of iterations."""
    lines = load_iterations(task.folder)
    bins = [lines[i : i + BIN] for i in range(0, len(lines), BIN)]
    return {key: [_mean([line[key] for line in part]) for part in bins] for key in WATCHED}


def _mean(values: list[float | None]) -> float:
    """Of the iterations that were not skipped; those have None."""
    there = [value for value in values if value is not None]
    return round(statistics.fmean(there), 5) if there else math.nan


WATCHED = ("reward", "grad_norm", "closed", "weight")


def check_one_world(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fingerprint of the weights that all runs were made with.

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
    """Everything that study.json holds but the costs.

    Args:
        tasks: {method: {seed: its task}}, `base` among them.
        rates: what is to be said about how they were chosen.
    """
    at = stage_figures(tasks)
    runs, names = last_stage(at), [name for name in tasks if name != "base"]
    seeds = finished_seeds(runs, names)
    asked = sorted(next(iter(tasks.values())))
    done = [task for of in tasks.values() for task in of.values() if is_finished(task)]
    records = [load_record(task) for task in done]
    worlds = check_one_world(records)
    recipe = {name: value for name, value in records[-1]["recipe"].items() if name not in ("output", "method", "seed")}
    return {
        **provenance(),
        "commits": sorted({record["commit"] for record in records}),
        "worlds": worlds,
        "complete": seeds == asked,
        "seeds": seeds,
        "recipe": recipe,
        "rates": rates,
        "summary": summarise_runs(runs, seeds, ["base", *names]) if seeds else {},
        "ranking": rank_methods(runs, seeds, names, "reward") if seeds else [],
        "findings": [one.to_dict() for one in table_2_findings(runs, seeds, names)] if seeds else [],
        "runs": at,
        "training": {
            name: {seed: training_curves(task) for seed, task in of.items() if has_scores(task)}
            for name, of in tasks.items()
            if name != "base"
        },
        "diverged": diverged_runs(records),
        "skipped": {
            "/".join(task.folder.parts[-3:]): record["skipped"]
            for task, record in zip(done, records)
            if record["skipped"]
        },
    }


def write_report(
    tasks: Mapping[str, Mapping[int, Task]], rates: Mapping[str, Any], output: Path, stem: str = "study"
) -> dict[str, Any] | None:
    """Writes study.json and study.md; what is in the first, None if no seed is finished for all methods."""
    found = collect_results(tasks, rates)
    if not found["seeds"]:
        print("no seed is finished for all methods yet: there is nothing to write")
        return None
    names = [name for name in tasks if name != "base"]
    runs = last_stage(found["runs"])
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{stem}.json").write_text(json.dumps(round_numbers(found), indent=1) + "\n")
    text = render_document(found, table_2_findings(runs, found["seeds"], names), load_costs())
    (output / f"{stem}.md").write_text(text)
    return found


def load_costs() -> dict[str, Any]:
    """{method: seconds and peak bytes of an iteration}, as study_cost.py last measured them."""
    path = Path(__file__).parent / "results" / "study_cost.json"
    return json.loads(path.read_text())["methods"] if path.exists() else {}


def round_numbers(value: Any) -> Any:
    """Numbers with six digits: what is read is the same on every machine that shows it."""
    if isinstance(value, Mapping):
        return {str(name): round_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [round_numbers(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
