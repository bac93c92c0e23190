"""A progress bar for a terminal, and plain lines where there is none."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

WINDOW = 3600.0
"""Seconds over which the speed is measured: an iteration may take minutes."""


class Advance(Protocol):
    """advance(count, figures, now): `count` more are done; prints a plain line now if `now`, else every tenth."""

    def __call__(self, count: int = 1, figures: str = "", now: bool = False) -> None: ...


class _WithFigures(Progress):
    """A bar, and the latest figures on a line of their own, so that neither is cut on a narrow terminal."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the two lines."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text.from_markup(f"  {task.fields['figures']}", overflow="ellipsis")


@contextmanager
def progress_bar(console: Console, label: str, total: int, completed: int = 0) -> Generator[Advance]:
    """Show how much is done, the latest figures, and the time left."""
    columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
    terminal = console.is_terminal
    with _WithFigures(*columns, console=console, disable=not terminal, speed_estimate_period=WINDOW) as progress:
        progress.add_task(label, total=total, completed=completed, figures="")
        task = progress.tasks[0]

        def advance(count: int = 1, figures: str = "", now: bool = False) -> None:
            before = int(task.completed)
            progress.update(task.id, advance=count, figures=figures)
            done = before + count
            if not terminal and (now or done * 10 // total > before * 10 // total):
                left = "" if task.time_remaining is None else f"about {task.time_remaining:.0f} s left"
                words = (label, f"{done}/{total}", figures, left)
                console.print(" ".join(word for word in words if word), highlight=False)

        yield advance
