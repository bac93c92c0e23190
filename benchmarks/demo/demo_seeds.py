"""The demo on three seeds that no setting was chosen on: gain in reward, further scorers and rules.

    python -m benchmarks.demo.demo_seeds
    python -m benchmarks.demo.demo_seeds --model sd3

Runs a recipe once per seed, each with its own training draws and held-out noise, and writes demo_seeds.json and
demo_seeds.png to results/ (demo_seeds_sd3.json and so on for another model or method). Fails if a seed does not pass
the demo's quality checks (check_demo.py): reward, further scorers, rules, junk. The settings were chosen by
choose_settings.py, on validation prompts and other seeds. About four minutes a seed.
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
from trajsurgery.runs.reports.run_report import table_rows
from trajsurgery.training.presets import presets, sd3, wan
from trajsurgery.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
METHODS = {"leapalign": LeapAlign(), "drtune": DRTune(), "refl": ReFL(), "draft_lv": DRaFTLV()}
MODELS = {"flux": presets, "sd3": sd3, "wan": wan}


@dataclass(frozen=True)
class Options:
    """Model, method and seeds."""

    method: str = "leapalign"
    """leapalign, drtune, refl or draft_lv: its default recipe on the embedded world."""
    model: str = "flux"
    """flux, sd3 or wan: the embedded model."""
    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 480
    """Held-out images or videos, spread evenly over the categories."""
    output: Path = RESULTS
    runs: Path = Path("outputs/demo_seeds")
    """Folder of the runs; finished runs in it are read, not repeated."""


def file_name_parts(options: Options) -> list[str]:
    """Return the model and method for file names, without the demo's own."""
    return [name for name in (options.model, options.method) if name not in ("flux", "leapalign")]


def recipe_on_seed(options: Options, seed: int) -> Recipe:
    """Return the method's default recipe on another seed."""
    chosen = MODELS[options.model](METHODS[options.method], "")["tiny"]
    folder = options.runs / "_".join(file_name_parts(options) or [options.method]) / str(seed)
    return replace(chosen, seed=seed, output=folder, evaluation=replace(chosen.evaluation, images=options.images))


def panels_by_title(lines: Iterable[dict[str, Any]]) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Return {title: [(record, name in it) for each seed]} for every figure that all seeds have."""
    rows_by_seed = [{title: (record, name) for title, record, name in table_rows(rows)} for rows in lines]
    return {
        title: [rows[title] for rows in rows_by_seed]
        for title in rows_by_seed[0]
        if all(title in rows for rows in rows_by_seed)
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw before and after for each seed: reward, further scorers, rule-based score, junk, diversity."""
    panels = panels_by_title(results["seeds"].values())
    columns = min(4, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3 * columns, 0.5 + 3 * height), layout="constrained")
    parts = figure.subplots(height, columns, squeeze=False).flat
    for axes, (title, records) in zip(parts, panels.items()):
        for place, (seed, (line, name)) in enumerate(zip(results["seeds"], records)):
            bar = 2 * (line[f"{name}_gain_se"] or 0)
            axes.plot([place - 0.12], [line[f"{name}_before"]], "o", color="#7a8691", markersize=8)
            axes.errorbar(place + 0.12, line[f"{name}_after"], bar, fmt="o", color="#0b6e99", capsize=4, markersize=8)
            axes.annotate(f"seed {seed}", (place, 0), xycoords=("data", "axes fraction"), xytext=(0, -14),
                          textcoords="offset points", ha="center")  # fmt: skip
        axes.set(title=title, xticks=[], xlim=(-0.6, len(results["seeds"]) - 0.4))
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.25)
    for axes in parts:
        axes.set_visible(False)
    figure.suptitle(
        f"grey before, blue after; bar: two paired standard errors of the gain; {results['images']} images a seed"
    )
    figure.savefig(path, dpi=150)


def main(options: Options) -> int:
    """Run the seeds, write, and return 1 if a seed fails a check."""
    lines: dict[str, Any] = {}
    for seed in options.seeds:
        evaluation = run(recipe_on_seed(options, seed))
        if evaluation is None:
            return 130
        lines[str(seed)] = {**evaluation, "reward_gain_in_se": in_standard_errors(evaluation)}
    used = recipe_on_seed(options, options.seeds[0]).to_dict()
    results = {**provenance(), "recipe": used, "images": options.images, "seeds": lines}
    name = "_".join(["demo_seeds", *file_name_parts(options)])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.output / f"{name}.png")
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
