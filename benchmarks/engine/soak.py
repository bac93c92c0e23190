"""Memory and open files of a run, watched from outside over 2,000 iterations after as many: neither grows.

    python -m benchmarks.engine.soak

The run is a whole one of the command line (benchmarks/engine/kills.py): evaluation, training with a validation round
every 8 iterations and a checkpoint every 3, closing evaluation. In its first half caches fill, of plans among others.
The second half is cut into blocks; the slope is that of a line through the blocks' means, its standard error that of
their scatter around the line.
Fails if a slope is more than `MOST` standard errors above zero. Writes soak.json and soak.png to results/.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from benchmarks.engine.kills import count_lines, finish, start
from benchmarks.provenance import provenance

MOST = 3.0
"""Standard errors above zero at which a slope counts as growth."""
BLOCKS = 20
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    """The run's process at one moment."""

    line: int
    """Lines of metrics.jsonl: iterations and validation rounds."""
    mebibytes: float
    """Resident memory."""
    files: int
    """Open file descriptors."""


@dataclass(frozen=True)
class Slope:
    """Growth over 1,000 iterations, with its standard error."""

    per_thousand: float
    standard_error: float

    @property
    def grows(self) -> bool:
        """Whether it is more than `MOST` standard errors above zero."""
        return self.per_thousand > MOST * self.standard_error


def sample(process: int, line: int) -> Sample:
    """Read a process's resident memory and open files from the system."""
    place = Path("/proc") / str(process)
    resident = int((place / "statm").read_text().split()[1]) * PAGE / 2**20
    return Sample(line, resident, len(list((place / "fd").iterdir())))


def watch(output: Path, iterations: int, every: int) -> list[Sample]:
    """Run to the end; return a sample for each `every` lines of the log."""
    (process,) = start(output, iterations, count=1)
    samples = list[Sample]()
    try:
        while process.is_alive() and process.pid:
            line = count_lines(output)
            if line >= every * (len(samples) + 1):
                samples.append(sample(process.pid, line))
                if len(samples) % 10 == 0:
                    print(samples[-1], flush=True)
            time.sleep(0.02)
        finish([process])
    finally:
        process.kill()
    return samples


def slope(lines: list[int], values: list[float]) -> Slope:
    """Fit a line through the means of `BLOCKS` blocks."""
    size = len(lines) // BLOCKS
    blocks = [slice(i * size, (i + 1) * size) for i in range(BLOCKS)]
    x, y = ([statistics.fmean(column[block]) for block in blocks] for column in (lines, values))
    fit = statistics.linear_regression(x, y)
    residuals = [b - fit.slope * a - fit.intercept for a, b in zip(x, y, strict=True)]
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    error = math.sqrt(sum(r**2 for r in residuals) / (BLOCKS - 2) / spread)
    return Slope(1000 * fit.slope, 1000 * error)


def draw(samples: list[Sample], path: Path) -> None:
    """Draw both figures over the run."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    lines = [sample.line for sample in samples]
    above.plot(lines, [sample.mebibytes - samples[0].mebibytes for sample in samples], lw=1)
    above.set_ylabel(f"MiB above {samples[0].mebibytes:.0f}")
    below.plot(lines, [sample.files for sample in samples], lw=1)
    below.set_ylabel("open files")
    below.set_xlabel("line of metrics.jsonl")
    for axes in (above, below):
        axes.axvline(lines[len(lines) // 2], color="0.7", lw=1)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def main(iterations: int = 4000, every: int = 5, results: Path = Path(__file__).parent / "results") -> None:
    """Run the study.

    Args:
        iterations: of the run.
        every: lines of the log from one sample to the next.
        results: the folder of soak.json and soak.png.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        samples = watch(Path(folder) / "run", iterations, every)
    if samples[-1].line < iterations:
        raise SystemExit(f"the run ended after {samples[-1].line} lines of its log")
    after = samples[len(samples) // 2 :]
    lines = [sample.line for sample in after]
    slopes = {
        "mebibytes": slope(lines, [sample.mebibytes for sample in after]),
        "files": slope(lines, [float(sample.files) for sample in after]),
    }
    result: dict[str, Any] = {
        **provenance(),
        "iterations": iterations,
        "samples": len(samples),
        "slope_of_1000_lines": {name: asdict(fit) for name, fit in slopes.items()},
        "first_after_warm_up": asdict(after[0]),
        "last": asdict(after[-1]),
        "seconds": round(time.monotonic() - began, 1),
    }
    (results / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(samples, results / "soak.png")
    growing = [name for name, fit in slopes.items() if fit.grows]
    print(json.dumps(result["slope_of_1000_lines"], indent=1))
    if growing:
        raise SystemExit(f"these grow: {', '.join(growing)}")


if __name__ == "__main__":
    tyro.cli(main)
