"""What a GPU tells: agreement, seconds and memory of FLUX.1-dev and SD3.5-Medium at real size, with random weights.

    python -m benchmarks.engine.gpu
    python -m benchmarks.engine.gpu --sections agreement time
    python -m benchmarks.engine.gpu --small      # tiny models on the CPU, to try the script out

Under ten minutes on one card of 80 GB. Each section runs in a process of its own, so that they survive each other's
failure; `predicted` runs on the CPU beside them. Writes gpu.json and gpu.md after every section.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.engine.gpu_measure import Record
from benchmarks.engine.gpu_models import Scale
from benchmarks.engine.gpu_sections import SECTIONS
from benchmarks.provenance import provenance

ROOT = Path(__file__).parents[2]
EXTRA = ("torchao", "peft", "open_clip_torch", "triton")
LEAST = 15
"""Seconds under which a section is not begun."""


@dataclass(frozen=True)
class Options:
    """Which sections, and for how long."""

    sections: tuple[str, ...] = tuple(SECTIONS)
    """Their names; all if left out."""
    small: bool = False
    """Tiny models on the CPU."""
    limit: int = 480
    """Seconds for all sections together; each has a limit of its own as well."""
    commit: str | None = None
    """The commit, where there is no git."""
    output: Path = Path(__file__).parent / "results"
    section: str | None = None
    """For the section's own process: the one to run."""
    record: Path | None = None
    """For the section's own process: the file of its figures."""


def run_section(options: Options) -> int:
    """Run one section in this process."""
    assert options.section is not None
    assert options.record is not None
    if torch.cuda.is_available() and options.section != "attention":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients were not finite at 2537 tokens on an H100
    work, _ = SECTIONS[options.section]
    work(Scale(options.small), Record(options.record, options.section))
    return 0


class Section:
    """A section's process."""

    def __init__(self, name: str, options: Options, folder: Path, seconds: float) -> None:
        self.name, self.path, self.log = name, folder / f"{name}.json", folder / f"{name}.log"
        self.began, self.limit = time.monotonic(), seconds
        command = [sys.executable, "-m", "benchmarks.engine.gpu", "--section", name, "--record", str(self.path)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if options.small:
            command.append("--small")
        if options.small or name == "predicted":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, start_new_session=True)

    def result(self) -> dict[str, Any]:
        """Wait for the process, end it at its limit, and return its figures."""
        try:
            code = self.process.wait(max(0.1, self.began + self.limit - time.monotonic()))
            state = "complete" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            state = f"stopped after {self.limit:.0f} s"
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        seconds = round(time.monotonic() - self.began, 1)
        figures = json.loads(self.path.read_text()) if self.path.exists() else {}
        result = {"state": state, "seconds": seconds, "figures": figures}
        if state != "complete":
            result["error"] = self.log.read_text()[-2000:]
            print(result["error"], flush=True)
        print(f"{self.name}: {state}, {seconds} s", flush=True)
        return result


def card(small: bool) -> dict[str, Any]:
    """Return the GPU's name and memory, and the versions that its figures depend on. It opens no CUDA context."""
    versions: dict[str, str] = {}
    for name in EXTRA:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpu = None if small else subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        gpu = f"unknown ({error})"
    return {"gpu": gpu, "cuda": torch.version.cuda, "more_versions": versions}


def table(found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    machine = found["card"]["gpu"] or "CPU, tiny models: a trial of the script"
    versions = f"torch {found['versions']['torch']}, diffusers {found['versions']['diffusers']}"
    about = "Random weights, bfloat16, one image, gradient checkpointing unless said."
    lines = ["# On a GPU", "", f"{machine}, {versions}, commit {found['commit']}: `{found['command']}`. {about}"]
    predicted = found["sections"].get("predicted", {}).get("figures", {})
    for name, section in found["sections"].items():
        lines += ["", f"## {name}", "", f"{section['state']}, {section['seconds']} s", ""]
        lines += ["| | |", "|---|---|"]
        for key, value in section["figures"].items():
            nested = isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values())
            rows = {f"{key}, {row}": inner for row, inner in value.items()} if nested else {key: value}
            lines += [f"| {row} | {_cell(inner)} |" for row, inner in rows.items()]
        for key, value in predicted.items():
            model, _, memory = key.partition(", ")
            measured = section["figures"].get(memory)
            if name == ("time" if "FLUX" in model else "sd35") and measured and "over_gib" in value:
                lines += [f"| {memory}, predicted over_gib | {_cell(value['over_gib'])} |"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items() if key != "each")
    if isinstance(value, list):
        return "; ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ").replace("|", "/")


def main(options: Options) -> int:
    """Run the sections and write what they found; 1 if one did not complete."""
    if unknown := set(options.sections) - set(SECTIONS):
        raise SystemExit(f"no sections {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}.")
    began, found = time.monotonic(), {**provenance(), "card": card(options.small), "sections": dict[str, Any]()}
    if options.commit:
        found["commit"] = options.commit
    options.output.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        return options.limit - (time.monotonic() - began)

    def write() -> None:
        (options.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.output / "gpu.md").write_text(table(found))

    with tempfile.TemporaryDirectory() as folder:
        beside = [Section(name, options, Path(folder), left()) for name in options.sections if name == "predicted"]
        for name in options.sections:
            if name == "predicted":
                continue
            if left() < LEAST:
                found["sections"][name] = {"state": "not begun: no time left", "seconds": 0, "figures": {}}
                continue
            seconds = min(SECTIONS[name][1], left())
            found["sections"][name] = Section(name, options, Path(folder), seconds).result()
            write()
        for section in beside:
            found["sections"][section.name] = section.result()
        write()
    print((options.output / "gpu.md").read_text())
    return int(any(section["state"] != "complete" for section in found["sections"].values()))


if __name__ == "__main__":
    arguments = tyro.cli(Options, description=__doc__)
    raise SystemExit(run_section(arguments) if arguments.section else main(arguments))
