"""Host memory and time of encoded prompts: in a folder that is read mapped, and in memory.

    python -m benchmarks.engine.encoded_prompts

Encodings have the size of FLUX.1-dev's: 512 tokens of 4,096 numbers in bfloat16, 4 MiB. A batch is drawn, joined and
read whole, as an iteration does. Memory is this process's own, without the page cache, which
the operating system takes back. Each way runs in a process of its own. Writes encoded_prompts.json to results/.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.provenance import provenance
from trajsurgery.training.encodings.encoding_folder import EncodingFolder

TOKENS, WIDTH = 512, 4096


def own_memory() -> float:
    """Return the MiB of this process that are no page cache."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def encoding(number: int) -> Tensor:
    """Return what stands for the encoding of a prompt."""
    return torch.full((TOKENS, WIDTH), number / 7, dtype=torch.bfloat16)


def measure(way: str, prompts: int, batch: int, rounds: int) -> dict[str, Any]:
    """Store all prompts, then read batches; return the memory that this took and the seconds of a batch."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder, before, rows = EncodingFolder(Path(place), ""), own_memory(), dict[int, Tensor]()
        for number in range(prompts):
            if way == "folder":
                folder.write([str(number)], {"0": encoding(number)}, {})
            else:
                rows[number] = encoding(number)

        def read(number: int) -> Tensor:
            if way == "memory":
                return rows[number]
            entry = folder.read([str(number)])
            if entry is None:
                raise RuntimeError(f"encoding {number} is gone")
            return entry[0]["0"]

        draw, seconds = torch.Generator().manual_seed(0), list[float]()
        for _ in range(rounds):
            numbers = torch.randint(prompts, (batch,), generator=draw).tolist()
            began = time.perf_counter()
            joined = torch.stack([read(number) for number in numbers])
            seconds.append(time.perf_counter() - began)
            if joined[:, 0, 0].tolist() != [encoding(number)[0, 0].item() for number in numbers]:
                raise RuntimeError("a batch holds other prompts' encodings")
            del joined
        quartiles = statistics.quantiles(seconds, n=4)
        figures = {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}
        return {"added_mebibytes": round(own_memory() - before, 1), "seconds_a_batch": figures}


def main(
    prompts: int = 500, batch: int = 32, rounds: int = 40, results: Path = Path(__file__).parent / "results"
) -> None:
    """Run the study."""
    figures: dict[str, Any] = {**provenance(), "prompts": prompts, "batch": batch, "mebibytes_a_prompt": 4.0}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for way in ("folder", "memory"):
            figures[way] = pool.apply(measure, (way, prompts, batch, rounds))
            print(way, figures[way], flush=True)
    (results / "encoded_prompts.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
