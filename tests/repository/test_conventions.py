"""Conventions checked on the source: layers, owners of imports, sizes, names, docstrings, cost of importing."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "trajsurgery"
FILES = sorted(LIBRARY.rglob("*.py"))

PACKAGES = "errors plans surgery pipelines methods testing tiny rewards training evaluation dry_run runs cli"
"""In the order of the data: a file imports only from its own package and from those before it."""

RANK = {name: i for i, name in enumerate([*PACKAGES.split(), "__main__"])}
MOST_ENTRIES = 15

OWNERS: dict[str, str] = {
    "networkx": "plans",
    "sympy": "plans",
    "diffusers": "pipelines tiny training evaluation dry_run runs",
    "matplotlib": "plans runs",
}
"""Third-party packages: the packages of the library that may import them."""

MOST_LINES, MOST_METHOD_LINES = 300, 15
HEAVY = ["torch", "torchvision", "sympy", "matplotlib", "diffusers", "transformers", "peft", "open_clip", "networkx"]
"""Packages that take a while to import."""
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc"}


def unit(path: Path) -> str:
    """The file or package of the layer table that a path belongs to."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or package of the library."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(path: Path, typing: bool) -> Iterator[str]:
    """The full names of the modules that a file imports, at any depth; `typing`: those for the type checker too."""
    skipped: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing:
            skipped.update(id(inner) for part in node.body for inner in ast.walk(part))
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; say `from trajsurgery.x import y`"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if module == "trajsurgery" or is_module(inner) else module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def library_imports(path: Path) -> set[str]:
    """The library's files and packages that a file imports."""
    return {name.split(".")[1] for name in imports(path, typing=True) if name.startswith("trajsurgery.")}


INNER = [path for path in FILES if path != LIBRARY / "__init__.py"]
NAMED = {str(path.relative_to(LIBRARY)): path for path in INNER}


@pytest.mark.parametrize("name", NAMED)
def test_a_file_imports_only_from_its_package_and_those_before(name: str) -> None:
    path = NAMED[name]
    assert unit(path) in RANK, f"{unit(path)} has no place in PACKAGES of tests/repository/test_conventions.py"
    for other in library_imports(path):
        assert other in RANK, f"{name} imports trajsurgery.{other}: import names from the file they live in"
        assert RANK[other] <= RANK[unit(path)], f"{name} imports {other}, which is of a later package"


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_have_no_cycle() -> None:
    names = {module_of(path) for path in INNER}
    edges = {module_of(path): (set(imports(path, typing=True)) & names) - {module_of(path)} for path in INNER}
    while free := [name for name, to in edges.items() if not to & edges.keys()]:
        for name in free:
            del edges[name]
    assert not edges, f"these files import each other in a circle: {sorted(edges)}"


def test_the_tree_is_small_and_each_package_says_what_it_holds() -> None:
    entries = [path for path in LIBRARY.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= MOST_ENTRIES, sorted(path.name for path in entries)
    for folder in (path for path in LIBRARY.rglob("*") if path.is_dir() and any(path.glob("*.py"))):
        assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"
        assert ast.get_docstring(tree(folder / "__init__.py")), f"{folder}/__init__.py does not say what lives there"


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_is_imported_by_its_owners_only(package: str) -> None:
    for path in INNER:
        imported = {name.split(".")[0] for name in imports(path, typing=False)}
        assert package not in imported or unit(path) in OWNERS[package].split(), f"{path} imports {package}"


def test_plans_do_not_import_torch() -> None:
    for path in (p for p in INNER if unit(p) in ("errors", "plans")):
        assert "torch" not in {name.split(".")[0] for name in imports(path, typing=True)}, path


def test_importing_loads_no_heavy_package() -> None:
    code = f"import sys, trajsurgery; dir(trajsurgery); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words", ["recipes/leapalign_flux.py", "recipes/reno_flux.py", "trajsurgery", "trajsurgery score"]
)
def test_help_imports_nothing_heavy(words: str) -> None:
    """`--help` and a misspelt flag answer in a second; torch alone takes two to import."""
    code = (
        f"import runpy, sys; sys.argv = [*{words.split()}, '--help']\n"
        "try: (runpy.run_path if '/' in sys.argv[0] else runpy.run_module)(sys.argv[0], run_name='__main__')\n"
        f"except SystemExit: print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_plan_is_made_without_torch() -> None:
    code = (
        "import sys; from trajsurgery import Plan, latent; print(Plan(latent(5).leap(0)));"
        "print([m for m in ('torch', 'sympy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["x_5 -> x^_0|5", "[]"]


def test_tiny_and_testing_are_attributes_of_the_package() -> None:
    code = (
        "import trajsurgery; print(trajsurgery.tiny.prompts('heldout')[0], trajsurgery.testing.check_gradient.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith("check_gradient")


def reexported_names(path: Path) -> set[str | None]:
    """The names that the type checker sees in a package: those imported `as` themselves, and what * stands for."""
    aliases = [(n.module or "", a) for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom) for a in n.names]
    starred = [ROOT / module.replace(".", "/") / "__init__.py" for module, a in aliases if a.name == "*"]
    return {a.asname for _, a in aliases}.union(*map(reexported_names, starred))


def test_every_exported_name_exists() -> None:
    import trajsurgery

    for name in trajsurgery.__all__:
        assert getattr(trajsurgery, name) is not None
    visible = reexported_names(LIBRARY / "__init__.py")
    assert set(trajsurgery.__all__) <= visible, "the type checker does not see every exported name"


def test_files_are_short_and_named_for_their_content() -> None:
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines < MOST_LINES, f"{path} has {lines} lines: it says two things"
        assert path.stem not in NAMELESS, f"{path}: name a file after what it says"


def test_a_method_is_a_short_function_of_times() -> None:
    for path in (p for p in INNER if unit(p) == "methods"):
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                lines = (node.end_lineno or 0) - first.lineno + 1
                assert lines <= MOST_METHOD_LINES, f"{path}: {node.name} has {lines} lines"


def test_everything_public_has_a_docstring() -> None:
    for path in FILES:
        module = tree(path)
        if module.body:
            assert ast.get_docstring(module), f"{path} does not say what it is"
        for node in module.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_ignore_comments_name_their_rule() -> None:
    for path in (p for p in tracked() if p.suffix == ".py"):
        for i, line in enumerate(path.read_text().splitlines(), 1):
            blanket = re.search(r"#\s*(noqa(?!: ?[A-Z])|type: ignore(?!\[)|pyright: ignore(?!\[))", line)
            assert not blanket, f"{path}:{i} ignores everything: name the rule"


@cache
def tracked() -> tuple[Path, ...]:
    """The files that git tracks, or those of the library outside of a clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return tuple(FILES)
    done = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT)
    return tuple(path for name in done.stdout.splitlines() if (path := ROOT / name).is_file())


def test_no_file_names_a_machine_or_a_registry() -> None:
    # in pieces, so that this file does not break the rule itself
    hosts = [re.escape("".join(p)) for p in (("py", "pi.org"), ("python", "hosted.org"), ("npm", "js.org"))]
    forbidden = re.compile(
        "|".join([r"(?<![\w.])/(?:work|root|home|Users)/\w", *hosts, re.escape("download.pytorch" + ".org")])
    )
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" not in raw[:8000]:
            match = forbidden.search(raw.decode("utf-8", "replace"))
            assert not match, f"{path} names {match.group() if match else ''}"
