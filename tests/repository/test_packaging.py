"""The wheel in an environment of its own, the sdist, the Dockerfile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from statistics import median

import pytest
from dockerfile_parse import DockerfileParser

import trajsurgery

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SLOWEST_IMPORT = 0.1
"""Seconds."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (folder / "lib").glob("*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def said(python: Path, *words: str) -> str:
    """What a command prints outside the checkout."""
    done = subprocess.run([python, *words], cwd=python.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_its_data_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"trajsurgery", f"trajsurgery-{trajsurgery.__version__}.dist-info"}
    for needed in (
        "py.typed",
        "recipes/leapalign_flux.py",
        "runs/reports/page/page.html",
        "runs/reports/page/page.js",
        "rewards/hpsv3_question.txt",
        "tiny/weights/pipeline/model_index.json",
    ):
        assert f"trajsurgery/{needed}" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".partial")]


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not (source / "tests").exists()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(build, cwd=source, check=True)
    first, second = (zipfile.ZipFile(next(folder.glob("*.whl"))) for folder in (built, tmp_path / "again"))
    assert {info.filename: info.CRC for info in first.infolist()} == {i.filename: i.CRC for i in second.infolist()}


def test_the_documented_size_is_the_wheel_s(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    text = (ROOT / "docs/how-to/install.md").read_text()
    documented = re.search(r"wheel has ([\d.]+) MB", text)
    assert documented is not None
    assert float(documented[1]) == pytest.approx(wheel.stat().st_size / 1e6, abs=0.5)


def test_the_installed_package_imports_at_once(installed: Path) -> None:
    code = "import time; begin = time.perf_counter(); import trajsurgery; print(time.perf_counter() - begin)"
    assert median(float(said(installed, "-c", code)) for _ in range(5)) < SLOWEST_IMPORT


def test_the_installed_commands_work_outside_a_checkout(installed: Path) -> None:
    script = str(installed.parent / "trajsurgery")
    assert "dx_0/dtheta" in said(installed, script, "explain", "leapalign")
    assert "Often used:" in said(installed, script, "train", "leapalign-flux", "--help")
    place = said(installed, "-c", "import trajsurgery; print(trajsurgery.__file__)")
    assert str(installed.parents[1]) in place
    code = (
        "import json; from trajsurgery.cli.recipe_names import shipped_recipes; print(json.dumps([*shipped_recipes()]))"
    )
    names = json.loads(said(installed, "-c", code))
    assert names == sorted(path.stem.replace("_", "-") for path in (ROOT / "recipes").glob("*.py"))


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert f"version: {trajsurgery.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_extras_are_named_after_what_they_bring() -> None:
    assert {"gpu", "trackers", "judges", "remote", "docs"} <= PROJECT["project"]["optional-dependencies"].keys()


def test_the_dockerfile_copies_what_exists_and_runs_the_command() -> None:
    parser = DockerfileParser(path=str(ROOT / "Dockerfile"))
    steps = parser.structure
    assert parser.baseimage.startswith("nvidia/cuda:")
    copied = [source for step in steps if step["instruction"] == "COPY" for source in step["value"].split()[:-1]]
    assert {"pyproject.toml", "trajsurgery", "recipes"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    values = {step["instruction"]: step["value"] for step in steps}
    (entry,) = json.loads(values["ENTRYPOINT"])
    assert entry in PROJECT["project"]["scripts"]
    assert values["USER"] not in ("root", "0")
    extras = re.findall(r"\[([\w,]+)\]", " ".join(step["value"] for step in steps if step["instruction"] == "RUN"))
    assert set(extras[0].split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
