"""What the sections of gpu.py measure with: figures on disk, seconds and peaks, whole gradients compared."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine.gpu_models import Bench, Scale

GIB = 2**30


@dataclass
class Record:
    """A section's figures. Every `add` rewrites the file, so that a process that dies leaves what it had."""

    path: Path
    section: str
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    began: float = field(default_factory=time.monotonic)

    def add(self, name: str, value: Any) -> None:
        """Record a figure and print it."""
        self.figures[name] = value
        self.path.write_text(json.dumps(_finite(self.figures), indent=1) + "\n")
        print(f"[{self.section} {time.monotonic() - self.began:5.1f} s] {name}: {value}", flush=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Seconds and peak memory of pieces of work; no memory on the CPU."""

    def __init__(self, scale: Scale) -> None:
        self.cuda = not scale.small

    def run(self, work: Callable[[], Any]) -> dict[str, float]:
        """Return the seconds, the peak above what was allocated before, and the whole peak (GiB)."""
        before = self._allocated()
        began = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() / GIB if self.cuda else math.nan
        return {"seconds": seconds, "over_gib": peak - before, "peak_gib": peak}

    def _allocated(self) -> float:
        if not self.cuda:
            return math.nan
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / GIB


def attempted(record: Record, name: str, work: Callable[[], Any]) -> Any:
    """Run one of several ways; what it raises is recorded, and the next one has its turn."""
    try:
        return work()
    except Exception as error:
        record.add(name, {"error": f"{type(error).__name__}: {str(error)[:300]}"})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def gradients(bench: Bench) -> list[Tensor | None]:
    """Take the gradients off the parameters."""
    taken = [p.grad for p in bench.trained]
    bench.clear()
    return taken


def gradient_difference(got: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> dict[str, Any]:
    """Compare two whole gradients in float32, tensor by tensor."""
    difference = norm = total = 0.0
    equal = finite = True
    for a, b in zip(got, reference, strict=True):
        if a is None or b is None:
            equal = equal and a is b
            continue
        x, y = a.float(), b.float()
        difference += float((x - y).square().sum(dtype=torch.float64))
        norm += float(y.square().sum(dtype=torch.float64))
        total += float(x.square().sum(dtype=torch.float64))
        equal, finite = equal and torch.equal(a, b), finite and bool(x.isfinite().all())
    apart = math.sqrt(difference / norm) if norm else math.nan
    return {"gradient_apart": apart, "gradient_norm": math.sqrt(total), "gradient_equal": equal, "finite": finite}


def compare(bench: Bench, record: Record, ways: Iterable[str]) -> None:
    """Compare x_0 with the plain call's, bit for bit, and gradients with those of the loop written by hand.

    No `.grad` exists beforehand, so that the reference gradient fits on the card beside the weights and one gradient.
    """
    plain, runs = bench.plain(), bench.ways()
    record.add("parameters", sum(p.numel() for p in bench.module.parameters()))
    bench.clear()
    bench.by_hand()
    reference = gradients(bench)

    def row(name: str) -> None:
        x = runs[name.removesuffix(", again")]()
        taken = gradients(bench)
        same = {"x0_equal": torch.equal(x, plain), "x0_apart": float((x.float() - plain.float()).abs().max())}
        record.add(name, same | gradient_difference(taken, reference))

    for name in ("by hand, again", *ways):
        bench.clear()
        attempted(record, name, lambda name=name: row(name))


def clock(bench: Bench, record: Record, runs: dict[str, Callable[[], Any]], pairs: int) -> None:
    """Record the median seconds and the peak of each way, in turns; `.grad` of all parameters exists beforehand."""
    meter, rows = Meter(bench.scale), dict[str, list[dict[str, float]]]()
    for parameter in bench.trained:
        parameter.grad = torch.zeros_like(parameter)
    for name, run in runs.items():
        if attempted(record, name, lambda name=name, run=run: meter.run(run)) is not None:
            rows[name] = []
    for number in range(pairs):
        for name in list(rows) if number % 2 else reversed(list(rows)):
            rows[name].append(meter.run(runs[name]))
        record.add("pairs", number + 1)
    for name, measured in rows.items():
        seconds = [row["seconds"] for row in measured]
        one = {"seconds": statistics.median(seconds), "each": seconds}
        record.add(name, one | {key: max(row[key] for row in measured) for key in ("over_gib", "peak_gib")})
