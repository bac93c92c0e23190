"""Where a figure comes from: the command, the versions, the machine, the commit. Written beside every figure."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "trajsurgery")


def provenance() -> dict[str, Any]:
    """A plain dict (JSON)."""
    return {
        "command": " ".join(["python", "-m", running_module(), *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load": round(os.getloadavg()[0], 2),
        "commit": commit(),
    }


def running_module() -> str:
    """The dotted name of the script that runs, as in `python -m benchmarks.engine.overhead`."""
    path = Path(sys.argv[0]).with_suffix("")
    return ".".join(("benchmarks", path.parent.name, path.name))


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the working tree, with a plus if tracked files differ from it."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=here
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", "../trajsurgery"],
            capture_output=True,
            text=True,
            check=True,
            cwd=here,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
