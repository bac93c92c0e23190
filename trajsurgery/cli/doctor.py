"""`trajsurgery doctor`: what is installed and what runs here; what is missing, and the command that gets it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

Mark = Literal["ok", "missing", "broken"]
_STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red"}
TOKENS = {"cuda": 2537, "cpu": 256}
"""Of an attention call; 2537 are FLUX.1-dev's at 720 px."""


@dataclass(frozen=True)
class Doctor:
    """Say what is installed, which devices, attention kernels, models and rewards work here, and what is missing."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    mark: Mark
    text: str


def examine(options: Doctor, console: Console) -> int:
    """Print the report; return 1 if something that the library needs is broken."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    broken = False
    with console.status("packages, kernels, models and rewards are looked at"):
        for finding in findings(options.device):
            table.add_row(finding.what, Text(finding.mark, _STYLES[finding.mark]), Text(finding.text))
            broken |= finding.mark == "broken"
    console.print(table, highlight=False)
    return int(broken)


def findings(device: str) -> Iterator[Finding]:
    """Look at everything in turn.

    Raises:
        RecipeError: there is no such device here.
    """
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from packages()
    yield from devices()
    yield from kernels(device)
    yield from models()
    yield from rewards()
    yield Finding("pipelines", "ok", f"{flow_pipelines()} of diffusers' files name a flow-matching scheduler")


def packages() -> Iterator[Finding]:
    """The packages that the library requires, and those of its extras that users need."""
    for requirement in requires("trajsurgery") or ():
        name = re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name == "trajsurgery" or (extra and extra[1] in ("dev", "docs", "originals", "quantised", "test")):
            continue
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            package = f"trajsurgery[{extra[1]}]" if extra else name
            yield Finding(name, "missing" if extra else "broken", f"pip install '{package}'")


def devices() -> Iterator[Finding]:
    """The processor and the GPUs."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    text = f"{os.cpu_count()} cores, {memory:.0f} GiB of memory, {free:.0f} GiB free on the disk of this folder"
    yield Finding("cpu", "ok", text)
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield Finding(f"cuda:{i}", "ok", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        yield Finding("cuda", "missing", "torch sees no GPU: the embedded world and the dry run need none")


def kernels(device: str) -> Iterator[Finding]:
    """Whether each of torch's attention kernels gives finite outputs and gradients here, in bfloat16."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from trajsurgery.training.distributed.ranks import choose_device

    place = choose_device(device)
    shape = (1, 4, TOKENS[place.type], 128)
    draw = torch.Generator(place).manual_seed(0)
    names = {
        "_native_flash": SDPBackend.FLASH_ATTENTION,
        "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
        "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
        "_native_math": SDPBackend.MATH,
    }
    for name, backend in names.items():
        q, k, v = (torch.randn(shape, device=place, dtype=torch.bfloat16, generator=draw) for _ in range(3))
        what = f"--attention {name}"
        try:
            with sdpa_kernel(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why it does not run
                out = torch.nn.functional.scaled_dot_product_attention(q.requires_grad_(), k, v)
                (gradient,) = torch.autograd.grad(out.float().square().sum(), q)
        except RuntimeError:
            yield Finding(what, "missing", f"does not run on {place}")
            continue
        finite = bool(out.isfinite().all() & gradient.isfinite().all())
        text = f"output and gradient {'are' if finite else 'are not'} finite on {place}, {shape[2]} tokens in bfloat16"
        yield Finding(what, "ok" if finite else "missing", text)


def models() -> Iterator[Finding]:
    """The embedded models, and whether those of the paper's presets are on this disk."""
    from trajsurgery.training.model.model_folder import model_problem
    from trajsurgery.training.settings import ModelSource

    yield Finding("tiny, tiny:sd3, tiny:wan", "ok", "embedded")
    for name in ("black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-medium"):
        problem = model_problem(ModelSource(name))
        text = f"not, or not whole, in the Hugging Face cache: hf download {name}"
        yield Finding(name, "missing" if problem else "ok", text if problem else "in the Hugging Face cache")


def rewards() -> Iterator[Finding]:
    """Each reward that the library knows by name: its weights and packages."""
    from trajsurgery.rewards.loading import reward_problem
    from trajsurgery.rewards.packaged import NAMES

    yield Finding("reward tiny", "ok", "embedded")
    for name in NAMES:
        problem = reward_problem(name)
        text = problem.removeprefix("no reward: ") if problem else "its weights are in the Hugging Face cache"
        yield Finding(f"reward {name}", "missing" if problem else "ok", text)


def flow_pipelines() -> int:
    """Return how many of the installed diffusers' pipeline files name a flow-matching scheduler. Imports none."""
    spec: Any = importlib.util.find_spec("diffusers")
    files = Path(spec.origin).parent.glob("pipelines/*/pipeline_*.py") if spec else ()
    return sum("FlowMatch" in path.read_text() for path in files)
