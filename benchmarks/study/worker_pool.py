"""Worker processes for the study's runs. They read from the disk what is left to do: any run can be interrupted."""

from __future__ import annotations

import fcntl
import multiprocessing
import signal
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.study.runs import Task, is_finished, run_task, spent_cost
from trajsurgery.errors import SurgeryError

Plan = Callable[[], Sequence[Task]]
"""All tasks known so far, in their order; called again after each task."""


def run_tasks(plan: Plan, folder: Path, workers: int, describe: Callable[[Task], str]) -> bool:
    """Run the unfinished tasks, several side by side; return False if interrupted.

    Args:
        folder: folder of the runs; only one study works in it at a time.
        describe: describes a finished task in a line.

    Raises:
        SurgeryError: another study works in the folder.
    """
    console = Console(soft_wrap=True)
    context, running = multiprocessing.get_context("spawn"), dict[Future[bool], Task]()
    with (
        lock_folder(folder),
        _interrupt_on_sigterm(),
        _progress_bar(console) as show,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        try:
            while True:
                tasks = plan()
                waiting = [task for task in tasks if task not in running.values() and not is_finished(task)]
                for task in waiting[: workers - len(running)]:
                    console.print(f"{_now()} begins {task.folder}", highlight=False)
                    running[pool.submit(run_task, task)] = task
                if not running:
                    return True
                done = _wait_for_one(running, tasks, show)
                if not _report_ended([(running.pop(future), future) for future in done], console, describe):
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            console.print("interrupted: runs are saved, the same command goes on")
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            return False


def _wait_for_one(
    running: dict[Future[bool], Task], tasks: Sequence[Task], show: Callable[[int, int], None]
) -> set[Any]:
    """Wait for a run to end while the bar moves."""
    done: set[Any] = set()
    while not done:
        done, _ = wait(running, timeout=5, return_when=FIRST_COMPLETED)
        show(sum(map(spent_cost, tasks)), sum(task.cost for task in tasks))
    return done


def _report_ended(ended: list[tuple[Task, Future[bool]]], console: Console, describe: Callable[[Task], str]) -> bool:
    """Print a line for each ended run; return whether all of them ran to their end."""
    for task, future in ended:
        if not future.result():
            return False
        console.print(f"{_now()} done   {task.folder}: {describe(task)}", highlight=False)
    return True


def _now() -> str:
    return time.strftime("%H:%M:%S")


@contextmanager
def lock_folder(folder: Path) -> Generator[None]:
    """Hold the folder's lock, which the system releases when the process ends in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SurgeryError(
                f"another study works in {folder}: wait for it, stop it, or pass --runs with another folder."
            ) from error
        yield


@contextmanager
def _progress_bar(console: Console) -> Generator[Callable[[int, int], None]]:
    """Show a progress bar of all runs; without a terminal, print a line every ten minutes."""
    columns = (TextColumn("study"), BarColumn(None), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    began, last, first = time.monotonic(), time.monotonic(), -1
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        whole = bar.add_task("study", total=None)

        def show(spent: int, total: int) -> None:
            nonlocal last, first
            first = spent if first < 0 else first
            bar.update(whole, completed=spent, total=total)
            if not console.is_terminal and time.monotonic() - last > 600 and spent > first:
                last = time.monotonic()
                left = (last - began) * (total - spent) / (spent - first) / 60
                console.print(f"{_now()} {spent / total:.0%}, about {left:.0f} minutes left", highlight=False)

        yield show


@contextmanager
def _interrupt_on_sigterm() -> Generator[None]:
    """Treat SIGTERM as Ctrl-C."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
