"""The progress bar on a terminal and in a log."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console

from trajsurgery.training.progress_bar import progress_bar


def printed(terminal: bool, completed: int = 0, slow: bool = False) -> str:
    """What is printed of 40 iterations; the tenth is a remarkable one."""
    out, clock = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=terminal, width=120)
    console.get_time = lambda: clock[0]
    with progress_bar(console, "LeapAlign", 40, completed) as advance:
        for i in range(completed + 1, 41):
            clock[0] += 60.0 if slow else 0.5
            advance(figures=f"reward {i / 100}", now=i == 10)
    return out.getvalue()


def test_a_log_has_a_line_for_every_tenth_and_for_remarkable_iterations() -> None:
    lines = printed(terminal=False).splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/40" for n in sorted([*range(4, 41, 4), 10])]
    assert lines[1] == "LeapAlign 8/40 reward 0.08 about 16 s left"
    assert lines[-1] == "LeapAlign 40/40 reward 0.4 about 0 s left"


def test_the_time_left_is_known_for_slow_iterations_and_for_resumed_runs() -> None:
    assert "LeapAlign 20/40 reward 0.2 about 1200 s left" in printed(terminal=False, slow=True)
    assert "LeapAlign 20/40 reward 0.2 about 1200 s left" in printed(terminal=False, slow=True, completed=10)


def test_a_terminal_shows_the_last_figures() -> None:
    text = printed(terminal=True)
    assert "40/40" in text
    assert "reward 0.4" in text
    assert "s left" not in text


RUN = """
import sys
from pathlib import Path
from tests.builders import toy_world
from trajsurgery import Trainer
recipe = toy_world.recipe(Path(sys.argv[1]), iterations=3)
Trainer(recipe, components=toy_world.world(recipe)).train()
"""


def test_a_run_on_a_real_terminal_shows_its_figures(tmp_path: Path) -> None:
    """A pseudo-terminal of 80 columns: a bar that moves, figures that are not cut, and the table in the end."""
    main, child = pty.openpty()
    termios.tcsetwinsize(child, (40, 80))
    command = [sys.executable, "-c", RUN, str(tmp_path / "run")]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=child, stderr=subprocess.STDOUT) as process:
        os.close(child)
        printed = b""
        with contextlib.suppress(OSError):  # how a pseudo-terminal says that the other side is closed
            while piece := os.read(main, 4096):
                printed += piece
    os.close(main)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.decode())
    assert "held-out images of the untuned model" in text
    assert re.search(r"LeapAlign ━+[^\n]* 3/3 ", text)
    assert re.search(r"reward -?0\.\d{4} loss \d+\.\d{3} \|g\| [\d.e-]+ [\d.]+ images/s [\d.]+ GiB", text)
    assert "paired SE" in text
    assert "report.html" in text
