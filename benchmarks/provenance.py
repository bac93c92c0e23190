"""Origin of a figure, written beside it: command, versions, machine, load, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "trajsurgery")


def provenance() -> dict[str, Any]:
    """Return the command, versions, machine, load and commit of this run as a plain dict (JSON)."""
    return {
        "command": " ".join(["python", "-m", running_module(), *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load": round(os.getloadavg()[0], 2),
        "commit": commit(),
    }


def installed_version(name: str) -> str:
    """Return a package's version, or say that it runs from a checkout that is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def running_module() -> str:
    """Return the dotted name of the running script, as in `python -m benchmarks.engine.overhead`."""
    path = Path(sys.argv[0]).with_suffix("")
    return ".".join(("benchmarks", path.parent.name, path.name))


def processor() -> str:
    """Return the processor's name where the system gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the working tree, with a plus if tracked files of the library differ from it."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=folder
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", "../trajsurgery"],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
