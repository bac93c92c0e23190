"""What several GPUs make of the paper's run, predicted, beside runs of several processes on this machine, measured.

    python -m benchmarks.engine.scaling_out
    python -m benchmarks.engine.scaling_out --parts predicted    # or measured: the other part is left as it is

predicted: `recipes/leapalign_flux.py --preset paper` on 1, 2, 4, 8 and 16 GPUs of 80 GB, eight a machine, by the dry
run: memory, compute at its utilisation, collectives at the stated bytes a second. No such run was made. An iteration's
seconds lie between two bounds: communication hidden behind compute, and none of it hidden.
measured: the embedded Flux on 1, 2 and 4 processes (gloo, one thread each), the whole training loop's iterations.
Strong: the batch stays; weak: it grows with the processes. Writes scaling_out.json, .md and .png to results/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from matplotlib.figure import Figure

from benchmarks.engine.scaling_out_predicted import Network, predict_all
from benchmarks.provenance import provenance

NAME = "scaling_out"
COLOURS = {"fsdp, iteration": "#0b6e99", "fsdp, layer": "#3c9a5f", "ddp": "#b9770e", "ideal": "#8a929c"}

TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""Images a second that the axes show."""


@dataclass(frozen=True)
class Options:
    """What to predict and measure."""

    parts: tuple[Literal["predicted", "measured"], ...] = ("predicted", "measured")
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16)
    processes: tuple[int, ...] = (1, 2, 4)
    network: Network = field(default_factory=Network)
    iterations: int = 7
    """Measured ones, after one for warm-up."""
    output: Path = Path(__file__).parent / "results"


def measure_all(options: Options) -> list[dict[str, Any]]:
    """Start the processes and return what they measured."""
    rows: list[dict[str, Any]] = []
    for count in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            module = ["-m", "benchmarks.engine.scaling_out_measured", "--file", str(file)]
            subprocess.run([*launch, *module, "--iterations", str(options.iterations)], check=True)
            rows += json.loads(file.read_text())
    return rows


def way_of(row: dict[str, Any]) -> str:
    """Return the name of a predicted row's way."""
    return ", ".join(name for name in (row["shard"], row["gather"]) if name)


def predicted_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| GPUs | way | memory, GiB | fits | gathers | reductions | received, GB | compute, s | iteration, s |"]
    lines.append("|" + "---|" * 9)
    for row in rows:
        low, high = row["seconds"]
        size, received = row["peak_bytes"] / 2**30, row["received_bytes"] / 1e9
        lines.append(
            f"| {row['gpus']} | {way_of(row)} | {size:.1f} | {'yes' if row['fits'] else 'no'} | {row['gathers']} | "
            f"{row['reductions']} | {received:.0f} | {row['compute_seconds']:.1f} | {low:.1f} to {high:.1f} |"
        )
    return lines


def measured_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| processes | way | scaling | images | s an iteration | quartiles | processor s, all processes |"]
    lines.append("|" + "---|" * 7)
    for row in rows:
        low, high = row["seconds"]["quartiles"]
        lines.append(
            f"| {row['processes']} | {row['way']} | {row['scaling']} | {row['batch']} | {row['seconds']['median']:.2f} "
            f"| {low:.2f} to {high:.2f} | {row['processor_seconds']['median']:.2f} |"
        )
    return lines


def as_markdown(record: dict[str, Any]) -> str:
    """Return both tables with their origin."""
    lines = ["# Scaling out", ""]
    for part, rows_as_table in (("predicted", predicted_table), ("measured", measured_table)):
        if part in record:
            origin = record[part]["origin"]
            machine, versions = origin["machine"], origin["versions"]
            lines += [
                f"## {part}",
                "",
                f"`{origin['command']}`, commit {origin['commit']}, torch {versions['torch']}, diffusers "
                f"{versions['diffusers']}; {record[part]['what']} Run on {machine['processor']}, {machine['cores']} "
                f"cores, load {origin['load']}.",
                "",
                *rows_as_table(record[part]["rows"]),
                "",
            ]
    return "\n".join(lines)


def draw_picture(record: dict[str, Any], path: Path) -> None:
    """Draw images a second against GPUs (predicted, as bounds), and against processes (measured)."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", ylabel="images a second")
        axes.minorticks_off()
    if "predicted" in record:
        draw_predicted(left, record["predicted"]["rows"], record["predicted"]["batch"])
    if "measured" in record:
        draw_measured(right, record["measured"]["rows"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.has_data():
            low, high = axes.get_ylim()
            shown = [tick for tick in TICKS if low < tick < high]
            axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_predicted(axes: Any, rows: list[dict[str, Any]], batch: int) -> None:
    """A band between the bounds for each way; a cross where it does not fit."""
    for way, colour in list(COLOURS.items())[:3]:
        mine = [row for row in rows if way_of(row) == way]
        gpus = [row["gpus"] for row in mine]
        fast, slow = ([batch / row["seconds"][i] for row in mine] for i in (0, 1))
        axes.fill_between(gpus, slow, fast, color=colour, alpha=0.3, linewidth=0)
        axes.plot(gpus, slow, color=colour, lw=1, label=way)
        for marker, fits in (("o", True), ("x", False)):
            points = [(n, y) for n, y, row in zip(gpus, slow, mine, strict=True) if row["fits"] is fits]
            axes.plot([n for n, _ in points], [y for _, y in points], marker, color=colour, ms=6)
    counts = sorted({row["gpus"] for row in rows})
    first = batch / rows[0]["compute_seconds"] / rows[0]["gpus"]
    axes.plot(counts, [first * n for n in counts], "--", color=COLOURS["ideal"], lw=1, label="compute alone")
    axes.set(xlabel="GPUs (cross: does not fit in 80 GB)", title="PREDICTED: FLUX.1-dev, the paper's run")
    axes.set_xticks(counts, map(str, counts))


def draw_measured(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A line for each way: strong scaling drawn through, weak dashed, quartiles as bars."""
    counts = sorted({row["processes"] for row in rows})
    for way, colour in list(COLOURS.items())[:3]:
        for scaling, style in (("strong", "-"), ("weak", "--")):
            mine = [row for row in rows if row["way"] in (way, "one process") and row["scaling"] == scaling]
            middle = [row["batch"] / row["seconds"]["median"] for row in mine]
            low, high = ([row["batch"] / row["seconds"]["quartiles"][i] for row in mine] for i in (1, 0))
            bars = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
            axes.errorbar(
                [row["processes"] for row in mine],
                middle,
                yerr=bars,
                fmt="o" + style,
                color=colour,
                ms=4,
                lw=1,
                label=f"{way}, {scaling}",
            )
    axes.set(xlabel="processes on a machine with 2 cores", title="measured: the embedded Flux, gloo")
    axes.set_xticks(counts, map(str, counts))


def main(options: Options) -> int:
    """Run the parts, and write them beside what the file holds of the other."""
    path = options.output / f"{NAME}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    options.output.mkdir(parents=True, exist_ok=True)
    if "predicted" in options.parts:
        within, across = options.network.within / 1e9, options.network.across / 1e9
        what = (
            f"H100s at 40% of 989 TFLOP/s, {within:.0f} GB/s a GPU within a machine of eight, {across:.0f} GB/s a GPU "
            "between machines, 64 images an iteration. No such run was made."
        )
        rows = predict_all(options.gpus, options.network)
        record["predicted"] = {"origin": provenance(), "what": what, "batch": 64, "rows": rows}
    if "measured" in options.parts:
        what = "the embedded Flux (1.0 M parameters), gloo, one thread a process; four processes share the two cores."
        origin, rows = provenance(), measure_all(options)
        record["measured"] = {"origin": origin, "what": what, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    text = as_markdown(record)
    (options.output / f"{NAME}.md").write_text(text)
    draw_picture(record, options.output / f"{NAME}.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
