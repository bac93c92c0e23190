"""The paper's ablations on the embedded world: Fig. 4a to 4f, Fig. 6 and Table 5, three seeds.

    python -m benchmarks.study.ablations

One thing is varied at a time around LeapAlign as study.py runs it, with the same prompts and noise, at the demo's rate.
At the rate that the study chose for LeapAlign, the grid's next, rules fall on two of its five seeds, and a variant
would be told from the centre by which seeds break down. Writes ablations.json, ablations.md and pictures to results/,
from the seeds that are finished for all variants. Finished runs are read and interrupted ones continue: repeat the
command after any interruption. Under two hours on 2 cores after the study.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from benchmarks.provenance import provenance
from benchmarks.study import ablation_terms, study
from benchmarks.study.ablation_pictures import draw
from benchmarks.study.ablation_variants import CENTRE, GROUPS, LEAPS, NORM, VARIANTS, findings
from benchmarks.study.methods import Budget
from benchmarks.study.report import check_one_world, last_stage, load_costs, round_numbers, stage_figures
from benchmarks.study.runs import Task, diverged_runs, has_scores, is_finished, load_iterations, load_record
from benchmarks.study.seed_statistics import NAMED, finished_seeds, interval, resolution
from benchmarks.study.tables import cell, half_width, row
from benchmarks.study.worker_pool import run_tasks
from trajsurgery.training.checkpoints.output_files import write_atomically

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Variants, seeds and budget."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    rate: float = 3e-5
    """The learning rate of all variants."""
    stages: tuple[int, ...] = (75, 150, 225)
    """The study's; variants are evaluated after the last one only."""
    images: int = 480
    workers: int = 2
    """Processes side by side, one thread each."""
    draws: int = 24
    """Plans whose gradient is evaluated term by term; 0 leaves this out."""
    report: bool = False
    """Only write tables and pictures of the finished runs."""
    output: Path = RESULTS
    runs: Path = Path("outputs/study")
    """The study's folder of runs."""

    @property
    def budget(self) -> Budget:
        """The study's budget."""
        return Budget(self.stages, self.images, self.runs)


def variant_task(options: Options, name: str, seed: int) -> Task:
    """Return the run of a variant; the centre's is the study's."""
    if name == CENTRE:
        return options.budget.run(CENTRE, options.rate, seed)
    changed = VARIANTS[name]
    folder = Path("ablations") / name.replace(" ", "_").replace(",", "").replace("/", "_") / str(seed)
    recipe = options.budget.recipe(changed.method, options.rate, seed, "heldout", folder)
    recipe = replace(recipe, objective=replace(recipe.objective, **changed.objective))
    return Task(recipe, options.stages[-1:])


def tasks_by_variant(options: Options) -> dict[str, dict[int, Task]]:
    """Return {variant: {seed: its run}}, base and centre first."""
    tasks = {"base": {seed: options.budget.base(seed) for seed in options.seeds}}
    for name in (CENTRE, *options.variants):
        tasks[name] = {seed: variant_task(options, name, seed) for seed in options.seeds}
    return tasks


def ordered_tasks(options: Options) -> Iterator[Task]:
    """Yield the runs, seed by seed with all variants."""
    tasks = tasks_by_variant(options)
    for seed in options.seeds:
        yield from (of[seed] for of in tasks.values())


def load_or_measure_terms(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Return the terms' norms at the untuned model and after the first seed's runs with alpha 0.3 and 1."""
    seed = options.seeds[0]
    runs = {name: variant_task(options, name, seed) for name in (CENTRE, "alpha 1")}
    folders = {"untuned": None, **{f"tuned, {name}": run.folder for name, run in runs.items() if has_scores(run)}}
    recipe = runs[CENTRE].recipe
    lines_by_model: dict[str, list[dict[str, Any]]] = {}
    for model, folder in folders.items():
        path = (
            options.runs
            / "terms"
            / f"{model.replace(', ', '_').replace(' ', '_')}_{options.rate:g}_{options.draws}_{seed}.json"
        )
        if not path.exists():
            if options.report:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = json.dumps(ablation_terms.measure_terms(recipe, options.draws, folder))
            write_atomically(path, lambda partial, lines=lines: partial.write_text(lines))
        lines_by_model[model] = json.loads(path.read_text())
    return lines_by_model


def collect_results(options: Options) -> dict[str, Any] | None:
    """Return the content of ablations.json, or None if no seed is finished for all variants."""
    tasks = tasks_by_variant(options)
    runs, names = last_stage(stage_figures(tasks)), [name for name in tasks if name != "base"]
    for name in names:
        for seed, line in runs[name].items():
            norms = [
                one["grad_norm"] for one in load_iterations(tasks[name][seed].folder) if one["grad_norm"] is not None
            ]
            line[NORM], line[f"{NORM}, mean"] = statistics.median(norms), statistics.fmean(norms)
    seeds = finished_seeds(runs, names)
    if not seeds:
        print("no seed is finished for all variants yet: there is nothing to write")
        return None
    records = [load_record(task) for of in tasks.values() for task in of.values() if is_finished(task)]
    worlds = check_one_world(records)
    complete = seeds == sorted(options.seeds)
    all_variants, costs_by_method = tuple(options.variants) == tuple(VARIANTS), load_costs()
    return {
        **provenance(),
        "commits": sorted({record["commit"] for record in records}),
        "worlds": worlds,
        "complete": complete,
        "seeds": seeds,
        "diverged": diverged_runs(records),
        "rate": options.rate,
        "groups": {
            group: [n for n in group_names if n in names]
            for group, group_names in GROUPS.items()
            if set(group_names) & set(options.variants)
        },
        "runs": {name: {seed: runs[name][seed] for seed in seeds} for name in tasks},
        "resolution": {f: resolution(runs, seeds, names, f) for f in ("reward", "rules")} if len(seeds) > 1 else {},
        "MiB": {
            name: costs_by_method[key]["peak_bytes"] / 2**20 for name, key in LEAPS.items() if key in costs_by_method
        },
        "findings": [finding.to_dict() for finding in findings(runs, seeds)] if all_variants else [],
    }


def render_document(record: Mapping[str, Any], further_parts: list[str]) -> str:
    """Return ablations.md: a table for every part of the paper, and the findings."""
    runs, seeds = record["runs"], record["seeds"]
    state = "all seeds asked for" if record["complete"] else "INCOMPLETE: only the seeds finished for all variants"
    state += "".join(f"; {run} diverged, and its seed is left out for all" for run in record["diverged"])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        "# The ablations on the embedded world",
        f"`{record['command']}`; {versions}; {record['machine']['processor']}, {record['machine']['cores']} cores; "
        f"commits {', '.join(record['commits'])}; world {', '.join(record['worlds'])}.",
        f"Seeds {seeds} ({state}), rate {record['rate']:g} for all. Gains over the base, paired; ± is half of the 95% "
        "interval over seeds, wide with so few of them, and not corrected for their number. The averaged weights are "
        "graded (Fig. 6 of the paper grades those that train). Gradient norm: before clipping, the median over "
        "iterations: a few are thirty times as large, and carry the mean. A leap that is the sampler's own step is not "
        "weighed, where Eq. 12 gives it 1 / tau: with weights at one place that is 8% of the draws. MiB: what an "
        "iteration keeps beside weights and moments (`study_cost.json`).",
    ]
    if resolution := record["resolution"]:
        parts.append(
            "If all variants spread alike over seeds, the difference of any two has a 95% interval of "
            f"± {resolution['reward']:.4f} in reward and ± {resolution['rules']:.3f} in rules (pooled over variants)."
        )
    columns = [*NAMED, "position", "attribute binding"]
    for group, names in record["groups"].items():
        measured = record["MiB"] if set(names) <= set(record["MiB"]) else {}
        head = [group, *(NAMED.get(column, column) for column in columns), NORM, *(["MiB"] if measured else [])]
        lines = [row(head), row(["---"] * len(head))]
        for name in names:
            gains = [
                interval([runs[name][seed][c] - runs["base"][seed][c] for seed in seeds]).to_dict() for c in columns
            ]
            norm = interval([runs[name][seed][NORM] for seed in seeds]).to_dict()
            cells = [cell(gain["mean"], half_width(gain), c, "+") for gain, c in zip(gains, columns)]
            spent = [f"{measured[name]:.0f}"] if measured else []
            lines.append(row([name, *cells, cell(norm["mean"], half_width(norm), "rules"), *spent]))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *further_parts]) + "\n"


def main(options: Options) -> int:
    """Run what is not finished, then write the results."""
    complete = options.report or run_tasks(
        lambda: list(ordered_tasks(options)), options.runs, options.workers, study.describe_task
    )
    record = collect_results(options)
    if record is None:
        return 0 if complete else 130
    all_findings = findings(record["runs"], record["seeds"]) if record["findings"] else []
    further_parts = (
        ["## What the paper found", *(finding.markdown() for finding in all_findings)] if all_findings else []
    )
    options.output.mkdir(parents=True, exist_ok=True)
    lines = load_or_measure_terms(options) if options.draws and complete else {}
    if lines:
        record["terms"] = {model: ablation_terms.summarise_terms(model_lines) for model, model_lines in lines.items()}
        further_parts += ["## The gradient's terms (medians)", "\n".join(ablation_terms.terms_table(record["terms"]))]
        ablation_terms.draw(lines, options.output / "ablation_terms.png")
    (options.output / "ablations.json").write_text(json.dumps(round_numbers(record), indent=1) + "\n")
    (options.output / "ablations.md").write_text(render_document(record, further_parts))
    draw(record, options.output / "ablations.png")
    return 0 if complete else 130


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
