"""The versions that pyproject.toml declares are those that the tests are run with."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())
OLDEST = dict(line.split("==") for line in (ROOT / "constraints/oldest.txt").read_text().splitlines() if "==" in line)
TESTED = ("parquet", "judges", "remote", "trackers", "test")


def test_each_lower_bound_is_the_release_that_make_test_oldest_installs() -> None:
    project = DECLARED["project"]
    lines = [*project["dependencies"], *(line for extra in TESTED for line in project["optional-dependencies"][extra])]
    bounds = {(r := Requirement(line)).name: str(r.specifier) for line in lines if not line.startswith("trajsurgery[")}
    assert len(bounds) > 20
    for name, bound in bounds.items():
        assert bound.startswith(">="), name
        assert Version(OLDEST[name]) == Version(bound.removeprefix(">=")), name


def test_the_lowest_python_is_the_same_for_the_installer_the_linter_and_the_type_checker() -> None:
    pythons = [c.rpartition(" ")[2] for c in DECLARED["project"]["classifiers"]]
    assert DECLARED["project"]["requires-python"] == f">={pythons[0]}"
    assert DECLARED["tool"]["pyright"]["pythonVersion"] == pythons[0]
    assert DECLARED["tool"]["ruff"]["target-version"] == "py" + pythons[0].replace(".", "")
