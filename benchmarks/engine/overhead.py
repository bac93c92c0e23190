"""Cost of `operate`: an iteration through it against a hand-written Algorithm 1 loop, and against the bare model calls.

    python -m benchmarks.engine.overhead

Both sample the same images from the same FluxPipeline (18 M parameters), take LeapAlign's two leaps, decode, score and
differentiate; images and gradients are compared first. Times are of alternating pairs on one thread; peaks are bytes of
tensors alive at once, counted storage by storage. Writes overhead.json and overhead.png to results/. Fails if a ratio
exceeds `MAX_TIME_RATIO` or `MAX_MEMORY_RATIO`. About 1.5 minutes on one core.
"""

from __future__ import annotations

import json
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.engine.leapalign_iteration import IterationBench, Options
from benchmarks.provenance import provenance

MAX_TIME_RATIO, MAX_MEMORY_RATIO = 1.05, 1.02  # what issue 2 promises


class PeakMemory(TorchDispatchMode):
    """Record the most bytes of tensors alive at once, of those created under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        input_storages = {v.untyped_storage()._cdata for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)}
        for value in tree_flatten(outputs)[0]:
            if isinstance(value, Tensor):
                self._note(value.untyped_storage(), input_storages)
        return outputs

    def _note(self, storage: Any, input_storages: set[int]) -> None:
        key = storage._cdata
        if key in self.alive or key in input_storages:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def time_run(run: Callable[[], object], clear: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of one run: wall clock, and processor time (which other processes do not lengthen)."""
    clear()
    began, work = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - work


def measure_peak(run: Callable[[], object], clear: Callable[[], None]) -> int:
    """Return the peak bytes of a run above what was alive before, gradients included."""
    clear()
    with PeakMemory() as mode:
        run()
    return mode.most


def check_same_work(bench: IterationBench) -> dict[str, float]:
    """Return how far the images and gradients of both ways differ: largest difference, relative difference."""
    results: list[tuple[Tensor, Tensor]] = []
    for run in (bench.through_operate, bench.by_hand):
        bench.clear()
        images = run()
        results.append((images, torch.cat([p.grad.flatten() for p in bench.module.parameters() if p.grad is not None])))
    (images, gradient), (reference_images, reference_gradient) = results
    difference = float((gradient - reference_gradient).norm() / reference_gradient.norm())
    assert difference < 1e-4, f"the gradients differ by {difference:.1e}: this compares different work"
    return {"images": float((images - reference_images).abs().max()), "gradients": difference}


def measure(options: Options) -> dict[str, Any]:
    """Measure times and peaks of all ways."""
    bench = IterationBench(options)
    runs = {
        "operate": bench.through_operate,
        "by hand": bench.by_hand,
        "bare T + 2": lambda: bench.bare_calls(options.steps),
        "bare T": lambda: bench.bare_calls(options.steps - 2),
    }
    differences = check_same_work(bench)
    for run in runs.values():
        time_run(run, bench.clear)
    times: dict[str, list[float]] = {name: [] for name in runs}
    work: dict[str, list[float]] = {name: [] for name in runs}
    for pair in range(options.pairs):
        for name in list(runs) if pair % 2 else list(reversed(runs)):
            for seconds_so_far, seconds in zip((times[name], work[name]), time_run(runs[name], bench.clear)):
                seconds_so_far.append(seconds)
    ratios = [a / b for a, b in zip(times["operate"], times["by hand"])]
    peak_bytes = {name: measure_peak(runs[name], bench.clear) for name in ("operate", "by hand")}
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "parameters": sum(p.numel() for p in bench.module.parameters()),
        "steps": options.steps,
        "batch": options.batch,
        "differences": differences,
        "time_ratio": statistics.median(ratios),
        "processor_time_ratio": statistics.median(a / b for a, b in zip(work["operate"], work["by hand"])),
        "time_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "memory_ratio": peak_bytes["operate"] / peak_bytes["by hand"],
        "ratio_to_T_forwards_and_2_forward_backwards": middle["operate"] / middle["bare T + 2"],
        "ratio_to_T_forwards_two_of_them_with_backward": middle["operate"] / middle["bare T"],
        "by_hand_ratio_to_T_forwards_two_of_them_with_backward": middle["by hand"] / middle["bare T"],
        "pairs": ratios,
        "seconds": times,
        "peak_bytes": peak_bytes,
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the seconds of every run, a column for each way; the ratios stand in the title."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    labels = {
        "operate": "operate",
        "by hand": "Algorithm 1\nby hand",
        "bare T + 2": "bare calls: T forwards\n+ 2 forward-backwards",
        "bare T": "bare calls: T forwards,\n2 of them with backward",
    }
    for place, name in enumerate(labels):
        values = record["seconds"][name]
        spread = [place + 0.25 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axes.plot(spread, values, "o", color="#0b6e99" if name == "operate" else "#7a8691", alpha=0.6)
        axes.hlines(statistics.median(values), place - 0.25, place + 0.25, color="black", linewidth=1.5)
    axes.set_xticks(range(len(labels)), labels.values())
    axes.set_ylim(0, 1.1 * max(max(values) for values in record["seconds"].values()))
    axes.set_ylabel("seconds an iteration")
    axes.set_title(
        f"operate / by hand: time {record['time_ratio']:.3f} (median of {len(record['pairs'])} pairs), "
        f"peak memory {record['memory_ratio']:.3f}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(options: Options) -> int:
    """Measure, write, and return 1 if a ratio exceeds its limit."""
    torch.set_num_threads(options.threads)
    record = {**provenance(), **measure(options)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "overhead.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, options.output / "overhead.png")
    within_limits = record["time_ratio"] <= MAX_TIME_RATIO and record["memory_ratio"] <= MAX_MEMORY_RATIO
    for name in (
        "time_ratio",
        "processor_time_ratio",
        "time_ratio_quartiles",
        "memory_ratio",
        "differences",
        *(n for n in record if "_T_" in n),
    ):
        print(f"{name}: {record[name]}")
    print(
        f"time at most {MAX_TIME_RATIO}, memory at most {MAX_MEMORY_RATIO}: {'kept' if within_limits else 'NOT kept'}"
    )
    return 0 if within_limits else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
