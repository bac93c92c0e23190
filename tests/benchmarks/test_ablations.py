"""The ablations' script: one thing is changed at a time, and the tables hold what the runs say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from tests.builders.study_runs import invented


def test_the_ablations_are_the_study_s_centre_with_one_thing_changed(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ablations, variants = script("study.ablations"), script("study.ablation_variants")
    options = ablations.Options(seeds=(0, 1), draws=0, output=tmp_path / "out", runs=tmp_path / "runs", report=True)
    tasks = ablations.tasks_by_variant(options)
    centre = tasks[variants.CENTRE][0].recipe.to_dict()
    assert set(variants.VARIANTS) == {name for of in variants.GROUPS.values() for name in of} - {variants.CENTRE}
    folders = {task.folder for of in tasks.values() for task in of.values()}
    assert len(folders) == 2 * len(tasks), "two variants share a folder"
    for name in variants.VARIANTS:
        changed = tasks[name][0].recipe
        assert changed.method.draw(25, torch.Generator().manual_seed(0)).outputs
        apart = {key for key, value in changed.to_dict().items() if value != centre[key]}
        assert apart <= {"method", "objective", "output"}, (name, apart)
        assert apart > {"output"}, f"{name} is the centre"
    for place, of in enumerate(tasks.values()):
        for seed, task in of.items():
            invented(task, place / 100 + seed / 1000, 0.5, seed)
    told = variants.findings(ablations.collect_results(options)["runs"], [0, 1])
    assert (
        told[0].verdict
        == "does not reappear: the opposite for leapalign - alpha 0, reward, leapalign - alpha 1, reward"
    )
    assert told[1].verdict == "not decided by these seeds", "all norms are equal"
    assert ablations.main(replace(options, variants=("alpha 1", "no weights"))) == 0
    told = json.loads((options.output / "ablations.json").read_text())
    assert told["complete"]
    assert told["runs"]["alpha 1"]["0"][variants.NORM] == 1, "the median"
    assert list(told["groups"].values()) == [["leapalign", "alpha 1"], ["no weights", "leapalign"]]
    assert (options.output / "ablations.png").stat().st_size > 10_000
    assert "INCOMPLETE" not in (options.output / "ablations.md").read_text()
