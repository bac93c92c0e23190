"""The progress bar on a terminal and in a log."""

from __future__ import annotations

import io

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
