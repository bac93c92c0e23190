"""The paper's ablations on the embedded world: Fig. 4a to 4f, Fig. 6 and Table 5, three seeds.

    python -m benchmarks.study.ablations

One thing is varied at a time around LeapAlign as study.py runs it, with the same prompts and noise, at the demo's rate:
at the one that the study chose for LeapAlign, the grid's next, rules fall on two of its five seeds, and a variant would
be told from the centre by which seeds break down. Writes ablations.json, ablations.md and pictures beside this file,
from the seeds that are whole. Finished runs are read, interrupted ones go on: the same command continues after any
interruption.
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
from trajsurgery.training.checkpoint import write_atomically

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Which variants, on which seeds."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    rate: float = 3e-5
    """The learning rate of all variants."""
    stages: tuple[int, ...] = (75, 150, 225)
    """The study's; variants are graded after the last alone."""
    images: int = 480
    workers: int = 2
    """Processes side by side, one thread each."""
    draws: int = 24
    """Plans whose gradient is taken apart term by term; 0 leaves it out."""
    report: bool = False
    """Only write tables and pictures of what is finished."""
    output: Path = RESULTS
    runs: Path = Path("outputs/study")
    """The study's folder."""

    @property
    def budget(self) -> Budget:
        """The study's."""
        return Budget(self.stages, self.images, self.runs)


def variant_task(options: Options, name: str, seed: int) -> Task:
    """A run of a variant; the centre's is the study's."""
    if name == CENTRE:
        return options.budget.run(CENTRE, options.rate, seed)
    changed = VARIANTS[name]
    folder = Path("ablations") / name.replace(" ", "_").replace(",", "").replace("/", "_") / str(seed)
    recipe = options.budget.recipe(changed.method, options.rate, seed, "heldout", folder)
    recipe = replace(recipe, objective=replace(recipe.objective, **changed.objective))
    return Task(recipe, options.stages[-1:])


def tasks_by_variant(options: Options) -> dict[str, dict[int, Task]]:
    """{variant: {seed: its run}}, base and centre first."""
    tasks = {"base": {seed: options.budget.base(seed) for seed in options.seeds}}
    for name in (CENTRE, *options.variants):
        tasks[name] = {seed: variant_task(options, name, seed) for seed in options.seeds}
    return tasks


def ordered_tasks(options: Options) -> Iterator[Task]:
    """One seed after the other with all variants."""
    tasks = tasks_by_variant(options)
    for seed in options.seeds:
        yield from (of[seed] for of in tasks.values())


def load_or_measure_terms(options: Options) -> dict[str, list[dict[str, Any]]]:
    """The terms' norms at the untuned model, and where the first seed's runs with alpha 0.3 and 1 ended."""
    seed = options.seeds[0]
    runs = {name: variant_task(options, name, seed) for name in (CENTRE, "alpha 1")}
    places = {"untuned": None, **{f"tuned, {name}": run.folder for name, run in runs.items() if has_scores(run)}}
    recipe = runs[CENTRE].recipe
    found: dict[str, list[dict[str, Any]]] = {}
    for model, place in places.items():
        kept = (
            options.runs
            / "terms"
            / f"{model.replace(', ', '_').replace(' ', '_')}_{options.rate:g}_{options.draws}_{seed}.json"
        )
        if not kept.exists():
            if options.report:
                continue
            kept.parent.mkdir(parents=True, exist_ok=True)
            lines = json.dumps(ablation_terms.measure_terms(recipe, options.draws, place))
            write_atomically(kept, lambda partial, lines=lines: partial.write_text(lines))
        found[model] = json.loads(kept.read_text())
    return found


def collect_results(options: Options) -> dict[str, Any] | None:
    """What ablations.json holds; None if no seed is whole."""
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
    asked, spent = tuple(options.variants) == tuple(VARIANTS), load_costs()
    return {
        **provenance(),
        "commits": sorted({record["commit"] for record in records}),
        "worlds": worlds,
        "complete": complete,
        "seeds": seeds,
        "diverged": diverged_runs(records),
        "rate": options.rate,
        "groups": {
            group: [n for n in of if n in names] for group, of in GROUPS.items() if set(of) & set(options.variants)
        },
        "runs": {name: {seed: runs[name][seed] for seed in seeds} for name in tasks},
        "resolution": {f: resolution(runs, seeds, names, f) for f in ("reward", "rules")} if len(seeds) > 1 else {},
        "MiB": {name: spent[key]["peak_bytes"] / 2**20 for name, key in LEAPS.items() if key in spent},
        "findings": [finding.to_dict() for finding in findings(runs, seeds)] if asked else [],
    }


def render_document(found: Mapping[str, Any], said: list[str]) -> str:
    """ablations.md: a table for every part of the paper, and its findings."""
    runs, seeds = found["runs"], found["seeds"]
    state = "all seeds asked for" if found["complete"] else "INCOMPLETE: only the seeds finished for all variants"
    state += "".join(f"; {run} diverged, and its seed is left out for all" for run in found["diverged"])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        "# The ablations on the embedded world",
        f"`{found['command']}`; {versions}; {found['machine']['processor']}, {found['machine']['cores']} cores; "
        f"commits {', '.join(found['commits'])}; world {', '.join(found['worlds'])}.",
        f"Seeds {seeds} ({state}), rate {found['rate']:g} for all. Gains over the base, paired; ± is half of the 95% "
        "interval over seeds, wide with so few of them, and not corrected for their number. The averaged weights are "
        "graded (Fig. 6 of the paper grades those that train). Gradient norm: before clipping, the median over "
        "iterations: a few are thirty times as large, and carry the mean. A leap that is the sampler's own step is not "
        "weighed, where Eq. 12 gives it 1 / tau: with weights at one place that is 8% of the draws. MiB: what an "
        "iteration keeps beside weights and moments (`study_cost.json`).",
    ]
    if apart := found["resolution"]:
        parts.append(
            "If all variants spread alike over seeds, the difference of any two has a 95% interval of "
            f"± {apart['reward']:.4f} in reward and ± {apart['rules']:.3f} in rules (pooled over variants)."
        )
    columns = [*NAMED, "position", "attribute binding"]
    for group, names in found["groups"].items():
        measured = found["MiB"] if set(names) <= set(found["MiB"]) else {}
        head = [group, *(NAMED.get(column, column) for column in columns), NORM, *(["MiB"] if measured else [])]
        lines = [row(head), row(["---"] * len(head))]
        for name in names:
            gains = [interval([runs[name][s][c] - runs["base"][s][c] for s in seeds]).to_dict() for c in columns]
            norm = interval([runs[name][s][NORM] for s in seeds]).to_dict()
            cells = [cell(g["mean"], half_width(g), c, "+") for g, c in zip(gains, columns)]
            spent = [f"{measured[name]:.0f}"] if measured else []
            lines.append(row([name, *cells, cell(norm["mean"], half_width(norm), "rules"), *spent]))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *said]) + "\n"


def main(options: Options) -> int:
    """Runs what is left, then writes what there is."""
    complete = options.report or run_tasks(
        lambda: list(ordered_tasks(options)), options.runs, options.workers, study.describe_task
    )
    found = collect_results(options)
    if found is None:
        return 0 if complete else 130
    told = findings(found["runs"], found["seeds"]) if found["findings"] else []
    said = ["## What the paper found", *(finding.markdown() for finding in told)] if told else []
    options.output.mkdir(parents=True, exist_ok=True)
    lines = load_or_measure_terms(options) if options.draws and complete else {}
    if lines:
        found["terms"] = {model: ablation_terms.summarise_terms(of) for model, of in lines.items()}
        said += ["## The gradient's terms (medians)", "\n".join(ablation_terms.terms_table(found["terms"]))]
        ablation_terms.draw(lines, options.output / "ablation_terms.png")
    (options.output / "ablations.json").write_text(json.dumps(round_numbers(found), indent=1) + "\n")
    (options.output / "ablations.md").write_text(render_document(found, said))
    draw(found, options.output / "ablations.png")
    return 0 if complete else 130


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
