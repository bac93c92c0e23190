"""What the commands share: presets, exit codes, printed errors."""

from __future__ import annotations

import pytest
from rich.console import Console

from trajsurgery.cli.command_line import INTERRUPTED, exit_code, read_recipe
from trajsurgery.errors import RecipeError
from trajsurgery.training.noise.noise_recipe import presets


def test_flags_change_the_preset_they_name() -> None:
    recipes = presets("out")
    assert read_recipe(recipes, "", []) == recipes["tiny"]
    recipe = read_recipe(recipes, "", ["--steps", "3", "--preset", "paper"])
    assert (recipe.preset, recipe.steps, recipe.model) == ("paper", 3, recipes["paper"].model)


@pytest.mark.parametrize("rank, prefix", [(None, ""), ("0", ""), ("1", "rank 1: ")])
def test_an_error_is_printed_as_it_is_with_its_rank(
    rank: str | None, prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)

    def run(_: Console) -> int:
        raise RecipeError("images are [batch, 3] " + "x" * 200)

    assert exit_code(run, "") == 1
    assert capsys.readouterr().out == f"{prefix}RecipeError: images are [batch, 3] {'x' * 200}\n"


def test_an_interruption_has_its_own_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Console) -> int:
        raise KeyboardInterrupt

    assert exit_code(run, ": the same command goes on") == INTERRUPTED == 130
    assert capsys.readouterr().out == "interrupted: the same command goes on\n"
    assert exit_code(lambda _: 7, "") == 7
