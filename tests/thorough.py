"""Draws 5,000 examples of every property, which takes hours: `python -m tests.thorough`.

One test after another, each in a process of its own with a limit of processor time. The table is printed as
Markdown, for tests/README.md; what a failing test printed goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"HYPOTHESIS_PROFILE": "thorough"}
EXAMPLES = 5000
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "hypothesis", "-o", "addopts="]


def pytest(*arguments: str, limit: int = resource.RLIM_INFINITY) -> tuple[str, int]:
    """Run pytest for at most `limit` seconds of processor time; return what it printed, and its exit code."""
    done = subprocess.run(
        [*PYTEST, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )
    return done.stdout, done.returncode


def properties(paths: list[str]) -> dict[str, int]:
    """Return the tests that draw examples, as `tests/file.py::name`, with their numbers of cases (parameters)."""
    printed, _ = pytest("--collect-only", "-q", *paths)
    return Counter(line.partition("[")[0] for line in printed.splitlines() if "::" in line)


def row(test: str, cases: int, limit: int) -> str:
    """Run one test, with all its cases, and return its row: cases that passed, their examples, result, seconds."""
    start = os.times().children_user
    printed, code = pytest("-v", "--hypothesis-show-statistics", test, limit=limit)
    passed = printed.count(" PASSED ")
    examples = sum(int(n) for n in re.findall(r"(\d+) passing, \d+ failing", printed)) or passed * EXAMPLES
    stopped = code in (-signal.SIGXCPU, -signal.SIGKILL)
    if code and not stopped:
        print(printed, file=sys.stderr, flush=True)
    result = "stopped" if stopped else "**failed**" if code else "passed"
    seconds = os.times().children_user - start
    return f"| `{test.removeprefix('tests/')}` | {passed} of {cases} | {examples:,} | {result} | {seconds:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", default=["tests/plans", "tests/testing", "tests/methods", "tests/surgery"])
    parser.add_argument("--limit", type=int, default=1200, help="seconds of processor time for each test")
    options = parser.parse_args()
    print("| property | cases | examples | result | seconds |\n|---|---|---|---|---|", flush=True)
    rows = []
    for test, cases in properties(options.paths).items():
        rows.append(row(test, cases, options.limit))
        print(rows[-1], flush=True)
    return int(any("failed" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
