"""README's snippets run, in order, in one namespace; what it says they print is what they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(python|text)\n(.*?)^```$", README, flags=re.M | re.S)


@pytest.mark.slow
def test_every_snippet_runs_and_prints_what_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = ""
    for kind, text in BLOCKS:
        if kind == "text":
            assert printed == text
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, "README.md", "exec"), names)
        printed = out.getvalue()
        assert not printed or f"```python\n{text}```\n\n```text\n{printed}```" in README, (
            "README shows what this prints"
        )


def test_every_file_that_readme_shows_or_links_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`(recipes/\w+\.py)`", README):
        assert (ROOT / name).exists(), name


def test_the_first_screen_is_short() -> None:
    assert README.index("## Install") < 1600


def test_the_make_targets_that_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{name}:", makefile, flags=re.M), name
