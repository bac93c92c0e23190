"""Cost of `operate`, retain and split: an iteration against a hand-written Algorithm 1 loop and the bare model calls.

    python -m benchmarks.engine.overhead

All sample the same images from the same FluxPipeline (18 M parameters), take LeapAlign's two leaps, decode, score and
differentiate; images and gradients are compared first. Times are of alternating rounds on one thread; peaks are bytes
of tensors alive at once beside weights and gradients, counted storage by storage; gradient memory is what the backward
pass adds to what the forward pass left. Writes overhead.json and overhead.png to results/. Fails if a ratio exceeds its
limit in `LIMITS`. About 3 minutes on one core.
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
from trajsurgery.surgery.velocity_calls import Memory

LIMITS = {
    "retain / by hand, time": 1.05,
    "split / by hand, time": 1.02,
    "retain / by hand, memory": 1.02,
    "split / retain, gradient memory": 0.6,
}


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

    def restart(self) -> int:
        """Begin a new peak at what is alive now; return its bytes."""
        self.most = self.now
        return self.now

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


def measure_peak(run: Callable[[], object], zero: Callable[[], None]) -> int:
    """Return the peak bytes of a run above weights and gradients, which exist before as a training loop's do."""
    run()
    zero()
    with PeakMemory() as mode:
        run()
    return mode.most


def measure_gradient_memory(bench: IterationBench, memory: Memory) -> int:
    """Return the bytes that the transformer's backward pass holds at most beyond what the forward pass has left."""
    bench.through_operate(memory)
    bench.zero()
    left = list[int]()
    with PeakMemory() as mode:
        bench.through_operate(memory, lambda: left.append(mode.restart()))
    return mode.most - left[0]


def check_same_work(bench: IterationBench) -> dict[str, dict[str, float]]:
    """Return, for retain and split, how far images and gradients are from by hand: largest and relative difference."""
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, run in bench.iterations().items():
        bench.clear()
        images = run()
        gradients = [p.grad.flatten() for p in bench.module.parameters() if p.grad is not None]
        results[name] = images, torch.cat(gradients)
    reference_images, reference_gradient = results.pop("by hand")
    differences = {
        name: {
            "images": float((images - reference_images).abs().max()),
            "gradients": float((gradient - reference_gradient).norm() / reference_gradient.norm()),
        }
        for name, (images, gradient) in results.items()
    }
    worst = max(difference["gradients"] for difference in differences.values())
    assert worst < 1e-4, f"the gradients differ by {worst:.1e}: this compares different work"
    return differences


def measure(options: Options) -> dict[str, Any]:
    """Measure times and peaks of all ways."""
    bench = IterationBench(options)
    runs: dict[str, Callable[[], object]] = {
        **bench.iterations(),
        "bare T + 2": lambda: bench.bare_calls(options.steps),
        "bare T": lambda: bench.bare_calls(options.steps - 2),
    }
    differences = check_same_work(bench)
    times: dict[str, list[float]] = {name: [] for name in runs}
    work: dict[str, list[float]] = {name: [] for name in runs}
    for pair in range(options.pairs):
        for name in list(runs) if pair % 2 else list(reversed(runs)):
            for seconds_so_far, seconds in zip((times[name], work[name]), time_run(runs[name], bench.clear)):
                seconds_so_far.append(seconds)
    pairs = {name: [a / b for a, b in zip(times[name], times["by hand"])] for name in ("retain", "split")}
    processor = {name: [a / b for a, b in zip(work[name], work["by hand"])] for name in pairs}
    peak_bytes = {name: measure_peak(run, bench.zero) for name, run in bench.iterations().items()}
    ways: tuple[Memory, ...] = ("split", "retain")
    gradient_bytes = {memory: measure_gradient_memory(bench, memory) for memory in ways}
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "parameters": sum(p.numel() for p in bench.module.parameters()),
        "steps": options.steps,
        "batch": options.batch,
        "differences": differences,
        "ratios": {
            **{f"{name} / by hand, time": statistics.median(ratios) for name, ratios in pairs.items()},
            "retain / by hand, memory": peak_bytes["retain"] / peak_bytes["by hand"],
            "split / retain, memory": peak_bytes["split"] / peak_bytes["retain"],
            "split / retain, gradient memory": gradient_bytes["split"] / gradient_bytes["retain"],
        },
        "quartiles": {name: statistics.quantiles(ratios, n=4)[::2] for name, ratios in pairs.items()},
        "processor_time_ratios": {name: statistics.median(ratios) for name, ratios in processor.items()},
        "by_time_of_T_forwards_and_2_forward_backwards": {n: middle[n] / middle["bare T + 2"] for n in times},
        "by_time_of_T_forwards_two_of_them_with_backward": {n: middle[n] / middle["bare T"] for n in times},
        "pairs": pairs,
        "seconds": times,
        "peak_bytes": peak_bytes,
        "gradient_bytes": gradient_bytes,
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the seconds of every run, a column for each way; the ratios stand in the title."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    labels = {
        "split": "operate,\nsplit",
        "retain": "operate,\nretain",
        "by hand": "Algorithm 1\nby hand",
        "bare T + 2": "bare calls:\nT forwards +\n2 forward-backwards",
        "bare T": "bare calls:\nT forwards, 2 of them\nwith backward",
    }
    for place, name in enumerate(labels):
        values = record["seconds"][name]
        spread = [place + 0.25 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axes.plot(spread, values, "o", color="#0b6e99" if name in record["pairs"] else "#7a8691", alpha=0.6)
        axes.hlines(statistics.median(values), place - 0.25, place + 0.25, color="black", linewidth=1.5)
    axes.set_xticks(range(len(labels)), labels.values())
    axes.set_ylim(0, 1.1 * max(max(values) for values in record["seconds"].values()))
    axes.set_ylabel("seconds an iteration")
    ratios = record["ratios"]
    axes.set_title(
        f"split / by hand: time {ratios['split / by hand, time']:.3f}, median of {len(record['pairs']['split'])}; "
        f"split / retain: peak memory {ratios['split / retain, memory']:.2f}, "
        f"of the backward pass {ratios['split / retain, gradient memory']:.2f}",
        fontsize="medium",
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
    for name in ("processor_time_ratios", "quartiles", "differences", "peak_bytes", "gradient_bytes"):
        print(f"{name}: {record[name]}")
    print(f"split / retain, memory: {record['ratios']['split / retain, memory']:.3f}, most of it activations of both")
    missed = [name for name, limit in LIMITS.items() if record["ratios"][name] > limit]
    for name, limit in LIMITS.items():
        print(f"{name}: {record['ratios'][name]:.3f}, at most {limit}{': MISSED' if name in missed else ''}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
