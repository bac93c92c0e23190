"""`--fit`: the setting that a search finds fits, needs each of its changes, and runs as the command that is printed."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.builders.small_pipelines import PIPELINES
from tests.dry_run.test_memory import recipe, small
from trajsurgery import RecipeError
from trajsurgery.cli import recipe_script, train_command
from trajsurgery.dry_run.fit import Trials, alternatives, fit, parse_memory
from trajsurgery.dry_run.savings import flags, savings
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Trained

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")  # RMSNorm under autocast is not fused on a CPU

PLAIN = replace(recipe("flux", memory="retain"), model="a folder")
ADAPTERS = replace(PLAIN, train=Trained("lora", base="float32"))
TRIALS = {recipe: Trials(recipe, small("flux")) for recipe in (PLAIN, ADAPTERS)}


def peak(settings: Recipe, changes: Any = ()) -> int:
    """The peak of a recipe with some changes."""
    trials = TRIALS[ADAPTERS if settings.train.what == "lora" else PLAIN]
    for change in changes:
        settings = change.apply(settings)
    return trials.plan(settings).peak


CHOSEN = ("second gradient", "at once", "one model call", "averages", "moments", "nf4")


@pytest.mark.parametrize("settings", [PLAIN, ADAPTERS], ids=["all weights", "adapters"])
def test_the_setting_fits_and_takes_no_costlier_change_than_any_other_that_fits(
    settings: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all sets of some changes: the one whose costliest change is cheapest, then its next, and so on."""
    trials = TRIALS[settings]
    changes = [change for change in savings(settings, trials.spec) if any(word in change.says for word in CHOSEN)]
    monkeypatch.setattr("trajsurgery.dry_run.fit.savings", lambda *_: changes)
    sets = [some for count in range(len(changes) + 1) for some in combinations(changes, count)]
    peaks = {some: peak(settings, some) for some in sets}
    for memory in sorted(peaks.values())[:: len(sets) // 6]:
        costs = [
            sorted((changes.index(change) for change in some), reverse=True) for some in sets if peaks[some] <= memory
        ]
        best = tuple(changes[i] for i in reversed(min(costs)))
        result = fit(settings, memory, trials)
        assert result.plan.fits
        assert result.plan.peak == peaks[best] <= memory


def test_a_recipe_that_fits_stays_as_it_is() -> None:
    result = fit(PLAIN, peak(PLAIN) + 1, TRIALS[PLAIN])
    assert (result.changes, result.recipe.rollout) == ((), PLAIN.rollout)


def test_a_change_takes_no_more_memory() -> None:
    """The search rests on it."""
    for settings in (PLAIN, ADAPTERS):
        changes = savings(settings, TRIALS[settings].spec)
        for i in range(len(changes)):
            before = changes[i + 1 :]
            assert peak(settings, changes[i:]) <= peak(settings, before), changes[i].says


def test_alternatives_are_single_changes_in_order_of_effect() -> None:
    changes = alternatives(PLAIN, TRIALS[PLAIN])
    peaks = [change.peak for change in changes]
    assert peaks == sorted(peaks)
    assert peaks[-1] < peak(PLAIN)
    by_flags = {change.flags: change.peak for change in changes}
    split = replace(PLAIN, rollout=replace(PLAIN.rollout, memory="split"))
    assert peak(split) == peak(PLAIN), "its decode is the peak, which a second gradient does not raise"
    assert "--rollout.memory split" not in by_flags
    assert by_flags["--rollout.at-once 1"] == peak(replace(PLAIN, rollout=replace(PLAIN.rollout, at_once=1)))


def test_flags_make_one_recipe_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line's own parser, also where a flag was given before."""
    after = PLAIN
    for change in savings(PLAIN, TRIALS[PLAIN].spec):
        after = change.apply(after)
    parsed = list[Recipe]()
    monkeypatch.setattr(train_command, "main", lambda recipe, console: parsed.append(recipe) or {})
    words = shlex.split(" ".join(flags(PLAIN, after)))
    assert recipe_script.cli({"tiny": PLAIN}, "", ["--rollout.memory", "retain", *words]) == 0
    assert parsed == [after]


@pytest.mark.parametrize("text, size", [("24GB", 24e9), ("22.5 GiB", 22.5 * 2**30), ("80gb", 80e9)])
def test_memory_is_read_in_both_units(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-1GB", "24TB"])
def test_a_memory_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="such as 24GB"):
        parse_memory(text)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> int:
    """The command on a folder of the small Flux."""
    PIPELINES["flux"]().pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["recipes/mine.py"])
    common = f"--dry-run --model {tmp_path / 'model'} --rollout.size 32 --output {tmp_path / 'run'}"
    return recipe_script.cli({"tiny": PLAIN}, "", [*common.split(), *words.split()])


def test_the_command_that_is_printed_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, monkeypatch, "") == 0
    memory = 0.7 * json.loads((tmp_path / "run/memory.json").read_text())["peak"]
    assert run(tmp_path, monkeypatch, f"--fit {memory / 1e9:.9f}GB") == 0
    printed = capsys.readouterr().out
    assert "The cheapest setting that fits takes" in printed
    command = next(line for line in printed.splitlines() if "python recipes/mine.py" in line)
    assert "--fit" not in command
    assert "--dry-run" not in command
    words = shlex.split(command)[2:]
    assert recipe_script.cli({"tiny": PLAIN}, "", [*words, "--dry-run", "--hardware.memory", str(memory)]) == 0
    assert "it fits" in capsys.readouterr().out


def test_what_fits_in_no_way_ends_in_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, monkeypatch, "--fit 0.00001GB") == 0
    printed = capsys.readouterr().out
    assert "The nearest takes" in printed
    assert "Its greatest part is" in printed
    assert "Ways out: a card with" in printed


def test_fit_belongs_to_the_dry_run() -> None:
    with pytest.raises(RecipeError, match=r"fit = 24GB.*--dry-run"):
        Recipe(fit="24GB")
