"""Run a selection of tests on a changed copy of the package, in forks of a process that has imported torch already."""

from __future__ import annotations

import compileall
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.cosmic_ray_mutants import Mutant

PRELOADED = (
    *("torch", "torch.func", "torch.testing", "torch._decomp.decompositions_for_jvp", "numpy", "sympy", "networkx"),
    *("pytest", "hypothesis", "hypothesis.strategies"),
)
"""What the tests import besides the package, loaded once. None of it may start a thread before a fork."""

CLOCK_FACTOR = 40
"""The wall clock limit is this many times the CPU limit: other work on the machine must not make a mutant "hang"."""


@dataclass(frozen=True)
class Outcome:
    """Result of the tests on one mutant."""

    verdict: str
    """survived, killed, or hangs (which counts as killed)."""
    test: str
    """The first test that failed."""
    cpu: float
    seconds: float


class ForkedTests:
    """A copy of the package and its tests, in which one file at a time is replaced by a mutant's."""

    def __init__(self, root: Path, copy: Path, tests: Sequence[str], slow: Sequence[str], limit: int) -> None:
        self.copy, self.tests, self.limit = copy, tests, limit
        self.slowest: list[str] = []
        self.options = [*(f"--deselect=tests/{test}" for test in slow), "-x", "-q", "-p", "no:cacheprovider"]
        self.options += ["-W", "ignore::SyntaxWarning"]  # of a mutant's `is 0`: no test's doing
        ignored = shutil.ignore_patterns("__pycache__", "weights", "*.safetensors", "tiny")
        for name in ("trajsurgery", "tests"):
            shutil.copytree(root / name, copy / name, ignore=ignored)
        shutil.copy(root / "pyproject.toml", copy)
        os.environ |= {"HYPOTHESIS_PROFILE": "mutants", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
        for name in PRELOADED:
            __import__(name)
        assert "trajsurgery" not in sys.modules, "the package itself is loaded in the forks"
        compileall.compile_dir(copy / "trajsurgery", quiet=1)

    def run(self, mutant: Mutant | None, first: Sequence[str]) -> Outcome:
        """Run the selection on the mutant (None: on the unchanged package), starting with the tests in `first`."""
        if mutant is None:
            return self._fork(first)
        file = self.copy / "trajsurgery" / mutant.file
        before = file.read_text()
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
            compiled.unlink()  # two mutants of one size within a second would pass for each other
        try:
            file.write_text(mutant.text)
            return self._fork(first)
        finally:
            file.write_text(before)

    def _fork(self, first: Sequence[str]) -> Outcome:
        began = time.monotonic()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._test(writing, first)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            message = pipe.read()
        _, status, used = os.wait4(child, 0)
        seconds, cpu = round(time.monotonic() - began, 2), round(used.ru_utime + used.ru_stime, 2)
        if os.WIFSIGNALED(status):
            hangs = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
            return Outcome("hangs" if hangs else "killed", f"signal {os.WTERMSIG(status)}", cpu, seconds)
        report = json.loads(message)
        self.slowest = report["slowest"]
        # 4: the conftest can't be imported, which only a mutant does; main() runs the package as it is first
        assert report["code"] in (0, 1, 2, 4), f"pytest could not run: {report}"
        return Outcome("killed" if report["code"] else "survived", report["test"], cpu, seconds)

    def _test(self, writing: int, first: Sequence[str]) -> None:
        """Run the tests in the child process, write a report to the pipe, and exit."""
        resource.setrlimit(resource.RLIMIT_CPU, (self.limit, self.limit + 1))
        signal.alarm(self.limit * CLOCK_FACTOR)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        sys.dont_write_bytecode = any(self.copy.glob("tests/__pycache__/*"))  # the first run compiles the tests
        os.chdir(self.copy)
        sys.path.insert(0, str(self.copy))
        watch = _TestRecorder()
        import pytest

        code = 0
        for part in (first, [test for test in self.tests if test not in first]):
            code = code or int(pytest.main([*(f"tests/{test}" for test in part), *self.options], plugins=[watch]))
        home = getattr(sys.modules.get("trajsurgery"), "__file__", None)
        assert home is None or Path(home).is_relative_to(self.copy), f"another copy was tested: {home}"
        slowest = [f"{s:6.2f} s {test}" for test, s in sorted(watch.times.items(), key=lambda item: -item[1])[:40]]
        os.write(writing, json.dumps({"code": code, "test": watch.failed, "slowest": slowest}).encode())
        os._exit(0)


class _TestRecorder:
    """A pytest plugin that records the first failure and the durations."""

    def __init__(self) -> None:
        self.failed = ""
        self.times: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._note(report)
        name = report.nodeid.partition("[")[0]
        self.times[name] = self.times.get(name, 0) + report.duration

    def pytest_collectreport(self, report: Any) -> None:
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid
