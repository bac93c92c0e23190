"""The study's scripts: interrupted runs resume, intervals are Student's, tables agree with the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.builders import toy_world
from tests.builders.study_runs import invented
from trajsurgery.errors import RecipeError, SurgeryError
from trajsurgery.methods import DRTune
from trajsurgery.training import components
from trajsurgery.training.presets import presets
from trajsurgery.training.training_loop import iteration_generator

# -- one run ----------------------------------------------------------------------------------------------------------


def toy_task(script: Callable[[str], ModuleType], folder: Path) -> Any:
    return script("study.runs").Task(toy_world.recipe(folder, iterations=4), (2, 4))


def test_an_interrupted_run_resumes_to_the_same_images(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = script("study.runs")
    monkeypatch.setattr(components, "load", toy_world.world)
    whole, resumed = toy_task(script, tmp_path / "straight"), toy_task(script, tmp_path / "broken")
    assert runs.run_task(whole)
    train, evaluate = runs.train, runs.evaluate

    def train_three_iterations(recipe: Any, *rest: Any) -> bool:
        return train(replace(recipe, iterations=min(recipe.iterations, 3)), *rest) and recipe.iterations < 4

    monkeypatch.setattr(runs, "train", train_three_iterations)
    assert not runs.run_task(resumed)
    assert not runs.is_finished(resumed)
    assert runs.spent_cost(resumed) == 3 + 15
    evaluations: list[int] = []
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "evaluate", lambda recipe, world: (evaluations.append(1), evaluate(recipe, world))[1])
    assert runs.run_task(resumed)
    assert runs.is_finished(resumed)
    assert len(evaluations) == 1, "the images of the first stage were made before the interruption"
    for stage in (2, 4):
        a, b = (runs.load_scores(task.folder, stage) for task in (whole, resumed))
        assert torch.equal(a.reward, b.reward)
        assert torch.equal(a.pictures, b.pictures)
    assert not torch.equal(runs.load_scores(whole.folder, 2).reward, runs.load_scores(whole.folder, 4).reward)
    assert [line["iteration"] for line in runs.load_iterations(resumed.folder)] == [1, 2, 3, 4]


def test_averaged_weights_are_scored_and_training_continues_without_them(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = script("study.runs")
    monkeypatch.setattr(components, "load", toy_world.world)
    staged, once = toy_task(script, tmp_path / "staged"), toy_task(script, tmp_path / "once")
    once = replace(once, stages=(4,))
    assert runs.run_task(staged)
    assert runs.run_task(once)
    assert torch.equal(runs.load_scores(staged.folder, 4).reward, runs.load_scores(once.folder, 4).reward)
    rewards = [[line["reward"] for line in runs.load_iterations(task.folder)] for task in (staged, once)]
    assert rewards[0] == rewards[1]


def test_a_diverged_run_does_not_stop_the_study(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, study, report = script("study.runs"), script("study.study"), script("study.report")
    monkeypatch.setattr(components, "load", toy_world.world)
    task = replace(toy_task(script, tmp_path / "run"), stages=(6,))
    task = replace(task, recipe=replace(task.recipe, optimiser=replace(task.recipe.optimiser, rate=1e30), iterations=6))
    assert runs.run_task(task), "it is finished"
    assert runs.is_finished(task)
    assert not runs.has_scores(task)
    assert "not finite" in study.describe_task(task)
    assert report.stage_figures({"refl": {0: task}}) == {"refl": {}}
    assert list(runs.diverged_runs([runs.load_record(task)])) == ["/".join(task.folder.parts[-3:])]
    options = study.Options(methods=("refl",), runs=tmp_path / "runs")
    for rate in options.rates:
        invented(options.budget.trial("refl", rate, 100), 0.1 - rate, 0.5, 7)
    assert study.choose_rates(options)["refl"]["left"] == [3e-6]
    smaller = options.budget.trial("refl", 3e-6, 100)
    invented(smaller, 5, 0.5, 7)
    done = json.loads((smaller.folder / "done.json").read_text())
    (smaller.folder / "done.json").write_text(json.dumps({**done, "diverged": "iteration 9"}))
    with pytest.raises(SurgeryError, match="smaller"):
        study.best_rate({1e-5: {}})
    rates = study.choose_rates(options)
    assert rates["refl"]["chosen"] == 1e-5
    assert "| refl | diverged | 0." in script("study.tables").rates_table(rates)


def test_a_folder_of_another_recipe_is_refused(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    runs = script("study.runs")
    task = toy_task(script, tmp_path / "run")
    invented(task, 0, 0.5, 0)
    assert runs.is_finished(task)
    with pytest.raises(RecipeError, match=r"seed: 0 there, 1 here"):
        runs.is_finished(replace(task, recipe=replace(task.recipe, seed=1)))


def test_two_studies_do_not_share_a_folder(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pool = script("study.worker_pool")
    with pool.lock_folder(tmp_path), pytest.raises(SurgeryError, match="another study"), pool.lock_folder(tmp_path):
        pass
    with pool.lock_folder(tmp_path):
        pass


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom, t", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227)])
def test_quantiles_are_those_of_the_printed_tables(script: Callable[[str], ModuleType], freedom: int, t: float) -> None:
    assert script("study.seed_statistics").t_quantile(freedom) == pytest.approx(t, rel=1e-5)


def test_an_interval_by_hand(script: Callable[[str], ModuleType]) -> None:
    figures = script("study.seed_statistics")
    interval = figures.interval([1.0, 2.0, 3.0])  # standard error 1 / sqrt(3)
    assert (interval.mean, interval.seeds) == (2, 3)
    assert interval.high - interval.mean == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert interval.verdict == "not decided"
    assert figures.interval([1.0, 1.1, 1.2]).verdict == "above 0"
    assert figures.interval([-1.0, -1.1, -1.2]).verdict == "below 0"
    assert figures.interval([5.0]).verdict == "not decided"
    assert figures.interval([5.0]).to_dict()["low"] is None
    with pytest.raises(ValueError, match="no seed"):
        figures.interval([])


def test_differences_are_paired_seed_by_seed(script: Callable[[str], ModuleType]) -> None:
    figures = script("study.seed_statistics")
    runs = {
        "base": {0: {"reward": 0.0}, 1: {"reward": 10.0}, 2: {"reward": 5.0}},
        "a": {0: {"reward": 1.0}, 1: {"reward": 11.1}},
        "b": {0: {"reward": 0.5}, 1: {"reward": 10.5}, 2: {"reward": 5.5}},
    }
    assert figures.finished_seeds(runs, ["a", "b"]) == [0, 1]
    assert figures.gain(runs, [0, 1], "a", "reward").low > 0  # the spread between seeds cancels
    assert figures.group_difference(runs, [0, 1], ["a", "b"], ["base"], "reward").mean == pytest.approx(0.775)
    assert figures.rank_methods(runs, [0, 1], ["b", "a"], "reward") == ["a", "b"]


def test_the_resolution_comes_from_the_spread_of_all_methods(script: Callable[[str], ModuleType]) -> None:
    figures = script("study.seed_statistics")
    runs = {
        "a": {0: {"r": 1.0}, 1: {"r": 5.0}},
        "b": {0: {"r": 2.0}, 1: {"r": 8.0}},
        "c": {0: {"r": 3.0}, 1: {"r": 8.0}},
    }
    # differences of the seeds: 4, 6, 5, hence a variance of 1 / 2 of one run, with 2 degrees of freedom
    assert figures.resolution(runs, [0, 1], ["a", "b", "c"], "r") == pytest.approx(4.30265 * 0.5**0.5, rel=1e-5)
    gains = [figures.gain(runs, [0, 1], name, "r", "a") for name in "bc"]
    assert figures.resolution(runs, [0, 1], ["a", "b"], "r") == pytest.approx(gains[0].high - gains[0].mean)
    assert math.isnan(figures.resolution(runs, [0], ["a", "b"], "r"))


def test_verdicts_of_findings(script: Callable[[str], ModuleType]) -> None:
    finding, interval = script("study.findings").Finding, script("study.seed_statistics").interval
    up, down, open_ = interval([1.0, 1.1]), interval([-1.0, -1.1]), interval([1.0, -1.0])
    assert finding("", {"x": up}).verdict == "reappears"
    assert finding("", {"x": up, "y": down}).verdict == "does not reappear: the opposite for y; above 0 for x"
    assert finding("", {"y": down}).verdict == "does not reappear: the opposite for y"
    assert finding("", {"x": up, "y": open_}).verdict == "in part: x; the rest is not decided"
    assert finding("", {"x": open_}).verdict == "not decided by these seeds"
    assert finding("", {"x": open_}, strict=False).verdict.startswith("not contradicted")
    assert finding("", {"x": down}, strict=False).verdict.startswith("does not reappear")


def test_the_grid_of_rates_grows_where_the_best_is_at_its_edge(script: Callable[[str], ModuleType]) -> None:
    rates_to_try, middle = script("study.methods").rates_to_try, (1e-5, 3e-5, 1e-4)
    assert rates_to_try({}, middle) == middle
    assert rates_to_try({1e-5: 1.0}, middle) == middle
    assert rates_to_try({1e-5: 1.0, 3e-5: 2.0, 1e-4: 1.0}, middle) == middle
    assert rates_to_try({1e-5: 1.0, 3e-5: 2.0, 1e-4: 3.0}, middle) == (*middle, 3e-4)
    assert rates_to_try({1e-5: 3.0, 3e-5: 2.0, 1e-4: 1.0}, middle) == (3e-6, *middle)
    assert rates_to_try({3e-6: 2.0, 1e-5: 3.0, 3e-5: 2.0, 1e-4: 1.0}, middle) == (3e-6, *middle)


# -- the whole study --------------------------------------------------------------------------------------------------


def test_the_order_of_the_runs_and_what_is_written(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    study = script("study.study")
    options = study.Options(
        methods=("refl", "leapalign"), seeds=(0, 1, 2), output=tmp_path / "out", runs=tmp_path / "runs", report=True
    )
    order = [str(task.folder.relative_to(options.runs)) for task in study.ordered_tasks(options)]
    assert order[:3] == ["base/validation_100", "rates/refl/1e-05", "rates/leapalign/1e-05"]
    assert order[-3:] == ["base/heldout_0", "base/heldout_1", "base/heldout_2"], "no run before its rate is chosen"
    for name, rise in (("refl", 0.1), ("leapalign", 0.2)):
        for rate in options.rates:
            invented(options.budget.trial(name, rate, 100), rise + (rate == 3e-5), 0.5 + (rate == 1e-5) / 2, 7)
    rates = study.choose_rates(options)
    assert [(line["chosen"], line["by_rules"]) for line in rates.values()] == [(3e-5, 1e-5)] * 2
    by_rules = replace(options, by="rules")
    assert [line["left"] for line in study.choose_rates(by_rules).values()] == [[3e-6]] * 2, (
        "the grid goes on by the rules"
    )
    for name in options.methods:
        invented(options.budget.trial(name, 3e-6, 100), 0, 0.5, 7)
    assert {line["chosen"] for line in study.choose_rates(by_rules).values()} == {1e-5}
    one = replace(options, rate=1e-6, methods=("refl",), seeds=(0,))
    assert study.choose_rates(one) == {"refl": {"chosen": 1e-6}}
    assert [task.folder.name for task in study.ordered_tasks(one)] == ["heldout_0", "0"], "nothing is tried"
    assert [study.file_stem(of) for of in (options, by_rules, one)] == ["study", "study_by_rules", "study_rate_1e-06"]
    order = [str(task.folder.relative_to(options.runs)) for task in study.ordered_tasks(options)]
    assert order[7:] == [
        f"{name}{seed}"
        for seed in (0, 1, 2)
        for name in ("base/heldout_", "seeds/refl/3e-05/", "seeds/leapalign/3e-05/")
    ]
    for seed in (0, 1):
        invented(options.budget.base(seed), 0, 0.5, seed)
        for name, rise in (("refl", 0.1), ("leapalign", 0.2)):
            invented(options.budget.run(name, 3e-5, seed), rise + seed / 100, 0.5, seed)
    invented(options.budget.base(2), 0, 0.5, 2)
    assert study.main(options) == 0
    result = json.loads((options.output / "study.json").read_text())
    assert result["seeds"] == [0, 1], "a seed that not all methods have finished is left out"
    assert not result["complete"]
    assert result["ranking"] == ["leapalign", "refl"]
    gain = result["summary"]["leapalign"]["reward"]["gain"]
    assert gain["mean"] == pytest.approx(0.205, abs=1e-5)
    assert str(tmp_path) not in json.dumps(result), "no path of a machine is published"
    text = (options.output / "study.md").read_text()
    assert "INCOMPLETE" in text
    assert "- leapalign - refl: +0.1000 [+0.1000, +0.1000]" in text
    assert result["skipped"]["refl/3e-05/0"] == result["skipped"]["leapalign/3e-05/0"] == 1
    assert result["training"]["refl"]["0"]["reward"] == [pytest.approx(6.6), pytest.approx(21.1)]
    assert (options.output / "study_rates.json").exists()
    assert study.main(replace(by_rules, output=tmp_path / "rules")) == 0
    assert [path.name for path in (tmp_path / "rules").iterdir()] == ["study_by_rules_rates.json"]
    done = json.loads((options.budget.base(2).folder / "done.json").read_text())
    (options.budget.base(2).folder / "done.json").write_text(json.dumps({**done, "world": "another"}))
    with pytest.raises(SurgeryError, match="worlds another, def"):
        study.main(options)
    for picture in ("study.png", "study_samples.png"):
        assert (options.output / picture).stat().st_size > 10_000


def test_memory_is_counted_where_a_plan_calls_the_model_most_often(script: Callable[[str], ModuleType]) -> None:
    recipe = presets(DRTune(), "")["tiny"]
    (heaviest,) = script("study.cost").heaviest_iterations(recipe, 1)
    first, most = (
        recipe.method.draw(25, iteration_generator(recipe.seed, n, "plan")).gradient().count for n in (1, heaviest)
    )
    assert (first, most) == (1, 2), "DRTune's first draws train one velocity"
