"""`operate` on 40 diffusers pipelines: images bit for bit, gradient, recompute, split, staged.

    python -m benchmarks.engine.pipelines

Each pipeline is built small from its own classes (tests/builders/pipelines), unmodified, and measured on one thread.
Images and re-entered velocities are compared with the plain call's (`torch.equal`); the tensors that get a gradient
with those that plain backpropagation through the undecorated loop reaches; LeapAlign's gradient with Algorithm 1 as a
loop, and with the other ways of running. Writes results/pipelines.json and docs/reference/pipelines.md. Fails if a
pipeline is not exact.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.provenance import provenance
from tests.builders.pipelines.checks import measured
from tests.builders.pipelines.every import BUILDERS

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Pipelines to measure, and where to write."""

    output: Path = RESULTS
    """The folder of pipelines.json."""
    page: Path = Path(__file__).parents[2] / "docs" / "reference" / "pipelines.md"
    only: tuple[str, ...] = ()
    """Names of pipelines; all if empty."""


def measure_pipeline(name: str) -> dict[str, Any]:
    """Return the measurements on one pipeline."""
    small = BUILDERS[name]()
    kind, sampler = type(small.pipe).__name__, type(small.pipe.scheduler).__name__
    about = {"pipeline": name, "class": kind, "scheduler": sampler, "dtype": str(small.pipe.transformer.dtype)}
    return about | dataclasses.asdict(measured(small))


def render_page(record: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    versions = record["versions"]
    lines = [
        "# Pipelines",
        "",
        f"Unmodified pipelines of diffusers {versions['diffusers']} (torch {versions['torch']}), built small from "
        "their own classes with random weights, under `operate(pipe, leapalign(T, 1, 0.3))`. Written by "
        f"`{record['command']}` at commit {record['commit']}; the tests in `tests/pipelines` assert the same.",
        "",
        "- **bit-exact**: images inside the block, without a plan, with one, under recompute and under split, equal "
        "the plain call's (`torch.equal`), and so does every velocity that is entered again.",
        "- **gradient**: the transformer's tensors that get one are those that plain backpropagation through the "
        "undecorated loop reaches (their number); the relative difference of the whole gradient from Algorithm 1 "
        "written out.",
        "- **recompute**, **split**, **staged**: the relative difference of the gradient from the retained one. "
        "Transformers cast to float32 inside; the rows marked \\* run in float32 throughout.",
        "",
        "| pipeline | sampler | T | bit-exact | gradient | recompute | split | staged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        mark = row["pipeline"] + ("" if row["dtype"] == "torch.float64" else " \\*")
        sampler = row["scheduler"].removesuffix("Scheduler").removesuffix("Discrete")
        exact = "yes" if row["exact"] and row["restored"] else "**no**"
        reached = f"{row['parameters']} tensors" if row["reached"] else "**other tensors**"
        numbers = [f"{row[name]:.0e}" if row[name] else "0" for name in ("by_hand", "recompute", "split", "staged")]
        cells = mark, sampler, str(row["steps"]), exact, f"{reached}, {numbers[0]}", *numbers[1:]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> int:
    """Measure, write and print; return 1 if a pipeline's images, gradient or velocities differ."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
    rows: list[dict[str, Any]] = []
    for name in options.only or BUILDERS:
        rows.append(measure_pipeline(name))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    record = {**provenance(), "rows": rows}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pipelines.json").write_text(json.dumps(record, indent=1) + "\n")
    options.page.write_text(render_page(record))
    all_exact = all(row["exact"] and row["reached"] and row["restored"] for row in rows)
    print(f"{len(rows)} pipelines: {'all promises kept' if all_exact else 'NOT all promises kept'}")
    return 0 if all_exact else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
