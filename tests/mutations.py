"""Breaks the library on purpose, one line at a time, and shows which test sees it: `python -m tests.mutations`.

Each mutation is made in a copy of the package; the tests named must fail there. They pass on the package as it is
(`--sound` checks that too). The table is printed as Markdown, for tests/README.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.builders.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


def run(package: Path | None, test: str) -> tuple[bool, str]:
    """Whether the test passes on that package (None: the one in the repository), and the name of the first failure."""
    path = str(ROOT) if package is None else f"{package}{os.pathsep}{ROOT}"
    environment = os.environ | {"PYTHONPATH": path, "HYPOTHESIS_PROFILE": "mutation"}
    folder = ROOT if package is None else package
    file, _, name = test.partition("::")
    target = str(folder / "tests" / file) + (f"::{name}" if name else "")
    command = [sys.executable, "-m", "pytest", target, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    first = failed[0].split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ") if failed else ""
    return done.returncode == 0, first.removeprefix("tests/")


def survives(mutation: Mutation, scratch: Path) -> tuple[bool, str]:
    """Whether the tests pass although the line is broken."""
    for name in ("trajsurgery", "tests", "pyproject.toml"):
        source, target = ROOT / name, scratch / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "weights", "*.safetensors"))
        else:
            shutil.copy(source, target)
    for name, old, new in ((mutation.file, mutation.old, mutation.new), *mutation.also):
        file = scratch / "trajsurgery" / name
        text = file.read_text()
        if text.count(old) != 1:
            return True, f"the line to break occurs {text.count(old)} times in {name}"
        file.write_text(text.replace(old, new))
    return run(scratch, mutation.test)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sound", action="store_true", help="check first that the tests pass on the package as it is")
    parser.add_argument("--only", default="", help="run the mutations whose name holds this")
    options = parser.parse_args()
    if options.sound:
        for test in dict.fromkeys(mutation.test for mutation in MUTATIONS):
            passed, _ = run(None, test)
            print(f"{test}: {'passes' if passed else 'FAILS'}", file=sys.stderr)
    print("| broken on purpose | in | first test that fails |\n|---|---|---|")
    alive = 0
    for mutation in MUTATIONS:
        if options.only in mutation.what:
            with tempfile.TemporaryDirectory() as scratch:
                survived, seen = survives(mutation, Path(scratch))
            alive += survived
            verdict = f"SURVIVED {seen}" if survived else f"`{seen}`"
            print(f"| {mutation.what} | `{mutation.file}` | {verdict} |", flush=True)
    return alive


if __name__ == "__main__":
    sys.exit(main())
