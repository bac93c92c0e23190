"""run.json: the command, the versions and the machine of a run."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from trajsurgery.training.checkpoints.checkpoint import library_versions
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.distributed import ranks

RUN_INFO = "run.json"


def write_run_info(output: Path, device: torch.device) -> None:
    """Write what a report says of where and how a run was made. A run that goes on writes it anew."""
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    info: dict[str, Any] = {
        "command": this_command(),
        "versions": library_versions(),
        "machine": machine(device),
        "processes": ranks.count(),
        "started": started,
    }
    write_atomically(output / RUN_INFO, lambda path: path.write_text(json.dumps(info, indent=1) + "\n"))


def this_command() -> str:
    """Return the command line of this process, without the paths of the interpreter and of installed scripts."""
    script = Path(sys.argv[0])
    if script.suffix == ".py":
        return shlex.join(["python", *sys.argv])
    return shlex.join([script.name, *sys.argv[1:]])


def machine(device: torch.device) -> str:
    """Return the name of the device: a GPU's, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads"
