"""README and the documentation: snippets run, print what the text says, commands parse, linked files exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from trajsurgery import cli
from trajsurgery.cli import noise_command, recipe_script, train_command

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
SNIPPETS = re.compile(r"^```(python|text)\n(.*?)^```$", flags=re.M | re.S)
COMMANDS = [
    (name, " ".join(line.split()))
    for name, path in PAGES.items()
    for block in re.findall(r"^```sh\n(.*?)^```$", path.read_text(), flags=re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
] + [("README.md", command) for command in re.findall(r"`((?:python recipes/|trajsurgery )[^`]+)`", README)]


@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if "```python" in path.read_text()])
def test_the_snippets_of_a_page_run_and_print_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": __name__}
    text, printed = PAGES[name].read_text(), ""
    for kind, code in SNIPPETS.findall(text):
        if kind == "text":
            assert not printed or printed == code
            printed = ""
            continue
        assert not printed, f"{name} does not show what the snippet before prints"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, name, "exec"), namespace)
        printed = "" if "Trainer(" in code else out.getvalue()  # it prints its times
    assert not printed, f"{name} does not show what its last snippet prints"


@pytest.mark.parametrize("name, command", COMMANDS, ids=lambda value: value)
def test_a_command_that_a_page_shows_is_accepted(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes and commands parse their flags; nothing is run. Users' own methods hold what their page shows."""
    monkeypatch.chdir(tmp_path)
    for file in re.findall(r"--method (\w+\.py):", command):
        (tmp_path / file).write_text(
            "".join(code for kind, code in SNIPPETS.findall(PAGES[name].read_text()) if kind == "python")
        )
    for file in re.findall(r"--config (\S+)", command):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("rollout: {batch: 16}\n")
    words = shlex.split(re.sub(r"^\w+=\S+ ", "", command), comments=True)
    parsed: list[object] = []
    for module in (noise_command, train_command):
        monkeypatch.setattr(module, "main", lambda recipe, console: parsed.append(recipe) or {})
    monkeypatch.setattr(train_command, "dry_run", lambda recipe, *_: parsed.append(recipe) or 0)
    monkeypatch.setattr(cli, "_run", lambda options, console: parsed.append(options) or 0)
    if words[:2] == ["docker", "run"]:  # the image's command is ours
        words = words[words.index("trajsurgery") :]
    if words[:1] == ["torchrun"]:
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[:1] == ["python"] and words[1].startswith("recipes/"):
        spec = importlib.util.spec_from_file_location("recipe", ROOT / words[1])
        assert spec is not None
        assert spec.loader is not None
        recipe: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        assert recipe_script.cli(recipe.RECIPES, "", words[2:]) == 0
        assert len(parsed) == 1
    elif words[:1] == ["trajsurgery"]:
        assert cli.main(words[1:]) == 0
        assert len(parsed) == 1
    elif words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    else:
        others = ["hf", "download"], ["pip", "install"], ["docker", "build"]
        assert words[:2] in others, f"{name}: {command} is not checked"


def test_every_file_that_readme_shows_or_links_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:recipes|benchmarks|docs)/[\w/.-]+)`", README):
        assert (ROOT / name).exists(), name


def test_results_that_the_pages_name_exist() -> None:
    for name, path in PAGES.items():
        for target in re.findall(r"`(benchmarks/[\w/.-]+\.\w+)`", path.read_text()):
            assert (ROOT / target).exists(), f"{name}: {target}"


def test_readme_is_short_and_its_first_screen_says_how_to_start() -> None:
    assert len(README.splitlines()) <= 180
    assert README.index("make demo") < 1200
    assert README.index("```python") < 1400


def test_the_make_targets_that_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{name}:", makefile, flags=re.M), name
