"""A run that is killed again and again, at random moments and within writes, ends like one that is not, bit for bit.

    python -m benchmarks.engine.kills              one process, 20 kills
    python -m benchmarks.engine.kills --ranks 2    two processes under FSDP2: one is killed, then the other

Both runs are whole ones of the command line: evaluation, training with a validation round every 8 iterations and a
checkpoint every 3, closing evaluation. Compared are weights, averages, optimiser, counters and metrics.jsonl (without
its seconds), by `tests.builders.saved_runs.assert_same_run`. Results go to benchmarks/engine/results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from benchmarks.provenance import provenance
from tests.builders import toy_world
from tests.builders.processes import PROCESSES
from tests.builders.saved_runs import assert_same_run
from trajsurgery.cli import train_command
from trajsurgery.cli.command_line import INTERRUPTED
from trajsurgery.training.checkpoints.run_log import METRICS
from trajsurgery.training.distributed import ranks
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.settings import Guards


def run(output: Path, iterations: int, environment: dict[str, str]) -> NoReturn:
    """Run a toy recipe as the command line does, and exit with its code."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ranks.join(torch.device("cpu"))
    recipe = toy_world.recipe(
        output,
        iterations=iterations,
        save_every=3,
        shard="auto" if ranks.count() == 1 else "fsdp",
        guards=Guards(every=8, images=4, patience=9999),
    )
    world = replace(
        toy_world.world(recipe),
        validation=(Prompt("a blue circle", "any"), Prompt("three circles", "any")),
        metrics={"green": lambda images, prompts: images[:, 1].mean((1, 2))},
    )
    with open(os.devnull, "w") as nowhere:
        result = train_command.main(recipe, world, Console(file=nowhere))
    ranks.leave()
    sys.exit(INTERRUPTED if result is None else 0)


@dataclass(frozen=True)
class Moment:
    """When a run was killed."""

    lines: int
    """Lines of metrics.jsonl then."""
    writing: bool
    """Whether a file or folder was half written."""


def start(output: Path, iterations: int, count: int) -> list[ForkServerProcess]:
    """Start a run's processes, with what a launcher sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = list[ForkServerProcess]()
    for rank in range(count):
        environment = {name: str(value) for name, value in (places | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(PROCESSES.Process(target=run, args=(output, iterations, environment), daemon=True))
        processes[-1].start()
    return processes


def signal_to(process: ForkServerProcess, number: int) -> None:
    """Send a signal, unless the process has ended."""
    if process.pid and process.is_alive():
        os.kill(process.pid, number)


def count_lines(output: Path) -> int:
    """Return how many lines the run's log has."""
    log = output / METRICS
    return log.read_bytes().count(b"\n") if log.exists() else 0


def is_writing(output: Path) -> bool:
    """Whether a file or folder of the run is half written."""
    return any(path.name.endswith((".partial", ".old")) for path in [*output.glob("*"), *output.glob("*/*")])


def kill_once(output: Path, iterations: int, count: int, draw: random.Random, in_write: bool) -> Moment | None:
    """Go on with the run and kill it after one to six more lines. Return when; None if it ended before."""
    processes, lines = start(output, iterations, count), count_lines(output)
    later, delay = draw.randint(1, 6), draw.random()
    try:
        while all(process.is_alive() for process in processes):
            due = count_lines(output) >= lines + later
            if due and not in_write:
                time.sleep(0.1 * delay)
            if due and (not in_write or _stops_within_a_write(processes, output, 0.005 * delay)):
                draw.shuffle(processes)
                for process in processes:
                    signal_to(process, signal.SIGKILL)
                    time.sleep(0.01 * delay)
                for process in processes:
                    process.join()
                return Moment(count_lines(output), is_writing(output))
            time.sleep(0.0005)
        finish(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return None


def _stops_within_a_write(processes: list[ForkServerProcess], output: Path, delay: float) -> bool:
    """Stop the processes if a file is half written, and let them go on if it was whole before they stopped."""
    if not is_writing(output):
        return False
    time.sleep(delay)
    for process in processes:
        signal_to(process, signal.SIGSTOP)
    if is_writing(output):
        return True
    for process in processes:
        signal_to(process, signal.SIGCONT)
    return False


def finish(processes: list[ForkServerProcess]) -> None:
    """Wait for a run's end.

    Raises:
        RuntimeError: a process failed.
    """
    for process in processes:
        process.join(600)
    codes = [process.exitcode for process in processes]
    if codes != [0] * len(processes):
        raise RuntimeError(f"a run ended with {codes}")


def compare_runs(folder: Path, kills: int, iterations: int, count: int, seed: int) -> list[Moment]:
    """Run once in peace and once with kills; assert that they ended alike. Return when it was killed."""
    whole, killed, draw, moments = folder / "whole", folder / "killed", random.Random(seed), list[Moment]()
    finish(start(whole, iterations, count))
    while len(moments) < kills:
        moment = kill_once(killed, iterations, count, draw, in_write=len(moments) % 2 == 0)
        if moment is None:
            raise RuntimeError(f"the run ended after {len(moments)} kills: take more iterations")
        moments.append(moment)
        print(f"kill {len(moments)}: {moment}", flush=True)
    finish(start(killed, iterations, count))
    assert_same_run(whole, killed)
    return moments


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, began = Path(tempfile.mkdtemp()), time.monotonic()
    try:
        moments = compare_runs(folder, options.kills, options.iterations, options.ranks, options.seed)
    finally:
        shutil.rmtree(folder)
    result: dict[str, Any] = {
        **provenance(),
        "iterations": options.iterations,
        "kills": len(moments),
        "within_a_write": sum(moment.writing for moment in moments),
        "lines_at_kill": [moment.lines for moment in moments],
        "bit_identical": True,
        "seconds": round(time.monotonic() - began, 1),
    }
    path = Path(__file__).parent / "results" / "kills.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results[f"{options.ranks} process{'es' * (options.ranks > 1)}"] = result
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
