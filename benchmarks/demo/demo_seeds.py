"""The demo on three seeds that chose nothing: does the reward rise on each, and what do the rules say?

    python -m benchmarks.demo.demo_seeds
    python -m benchmarks.demo.demo_seeds --model sd3

Runs a recipe once a seed, each with its own training draws and held-out noise, and writes demo_seeds.json and
demo_seeds.png beside this file (demo_seeds_sd3.json and so on for another model or method). Fails if a seed does not
pass the demo's gate (check_demo.py): reward, further scorers, rules, junk. Settings were chosen by choose.py, on
validation prompts and other seeds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro
from matplotlib.figure import Figure

from benchmarks.demo.check_demo import STANDARD_ERRORS, failed_quality_checks
from benchmarks.provenance import provenance
from trajsurgery.cli.train_command import main as run
from trajsurgery.evaluation.paired_statistics import in_standard_errors
from trajsurgery.methods import DRaFTLV, DRTune, LeapAlign, ReFL
from trajsurgery.reports.run_report import table_rows
from trajsurgery.training.presets import sd3, wan
from trajsurgery.training.recipe import Recipe, presets

RESULTS = Path(__file__).parent / "results"
METHODS = {"leapalign": LeapAlign(), "drtune": DRTune(), "refl": ReFL(), "draft_lv": DRaFTLV()}
MODELS = {"flux": presets, "sd3": sd3, "wan": wan}


@dataclass(frozen=True)
class Options:
    """Which demo, on which seeds."""

    method: str = "leapalign"
    """leapalign, drtune, refl or draft_lv: its default recipe on the embedded world."""
    model: str = "flux"
    """flux, sd3 or wan: the embedded model."""
    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 480
    """Held-out images or videos, spread evenly over the categories."""
    output: Path = RESULTS
    runs: Path = Path("outputs/demo_seeds")
    """Where the runs themselves are written; runs that are finished there are read, not repeated."""


def file_name_parts(options: Options) -> list[str]:
    """What of the options is in the names of files: all but the demo's own."""
    return [name for name in (options.model, options.method) if name not in ("flux", "leapalign")]


def recipe_on_seed(options: Options, seed: int) -> Recipe:
    """The method's default recipe on another seed."""
    chosen = MODELS[options.model](METHODS[options.method], "")["tiny"]
    folder = options.runs / "_".join(file_name_parts(options) or [options.method]) / str(seed)
    return replace(chosen, seed=seed, output=folder, evaluation=replace(chosen.evaluation, images=options.images))


def panels_by_title(lines: Iterable[dict[str, Any]]) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Title: (record, name in it) of each seed, for every figure that all seeds have, as in a run's own report."""
    told = [{said: (record, name) for said, record, name in table_rows(line)} for line in lines]
    return {said: [line[said] for line in told] for said in told[0] if all(said in line for line in told)}


def draw(found: dict[str, Any], path: Path) -> None:
    """Before and after, seed by seed: reward, further scorers, rule-based score, junk, diversity."""
    told = panels_by_title(found["seeds"].values())
    columns = min(4, len(told))
    height = math.ceil(len(told) / columns)
    figure = Figure(figsize=(3 * columns, 0.5 + 3 * height), layout="constrained")
    parts = figure.subplots(height, columns, squeeze=False).flat
    for axes, (title, records) in zip(parts, told.items()):
        for place, (seed, (line, name)) in enumerate(zip(found["seeds"], records)):
            bar = 2 * (line[f"{name}_gain_se"] or 0)
            axes.plot([place - 0.12], [line[f"{name}_before"]], "o", color="#7a8691", markersize=8)
            axes.errorbar(place + 0.12, line[f"{name}_after"], bar, fmt="o", color="#0b6e99", capsize=4, markersize=8)
            axes.annotate(f"seed {seed}", (place, 0), xycoords=("data", "axes fraction"), xytext=(0, -14),
                          textcoords="offset points", ha="center")  # fmt: skip
        axes.set(title=title, xticks=[], xlim=(-0.6, len(found["seeds"]) - 0.4))
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.25)
    for axes in parts:
        axes.set_visible(False)
    figure.suptitle(
        f"grey before, blue after; bar: two paired standard errors of the gain; {found['images']} images a seed"
    )
    figure.savefig(path, dpi=150)


def main(options: Options) -> int:
    """Runs the seeds, writes, and says whether the reward rose on each."""
    lines: dict[str, Any] = {}
    for seed in options.seeds:
        evaluation = run(recipe_on_seed(options, seed))
        if evaluation is None:
            return 130
        lines[str(seed)] = {**evaluation, "reward_gain_in_se": in_standard_errors(evaluation)}
    used = recipe_on_seed(options, options.seeds[0]).to_dict()
    found = {**provenance(), "recipe": used, "images": options.images, "seeds": lines}
    name = "_".join(["demo_seeds", *file_name_parts(options)])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, options.output / f"{name}.png")
    failed = {seed: list(failed_quality_checks(line)) for seed, line in lines.items()}
    for seed, line in lines.items():
        if not line["reward_gain_in_se"] > STANDARD_ERRORS:
            failed[seed].append(f"the reward rose by {line['reward_gain_in_se']:.1f} paired standard errors only")
    print("the gate:", {seed: reasons or "passed" for seed, reasons in failed.items()})
    graded = {seed: line.get("metrics", {}) for seed, line in lines.items()}  # none in runs of 0.1.0
    for name in graded[str(options.seeds[0])]:
        gains = [in_standard_errors(metrics[name]) for metrics in graded.values() if name in metrics]
        print(
            f"scorer {name}, which no gradient climbs, in paired standard errors: {[round(gain, 1) for gain in gains]}"
        )
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
