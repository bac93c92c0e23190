"""The ablation script: each variant changes one thing, and the tables agree with the runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from tests.builders.study_runs import invented


def test_ablations_are_the_centre_of_the_study_with_one_change(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ablations, variants = script("study.ablations"), script("study.ablation_variants")
    options = ablations.Options(seeds=(0, 1), draws=0, output=tmp_path / "out", runs=tmp_path / "runs", report=True)
    tasks = ablations.tasks_by_variant(options)
    centre = tasks[variants.CENTRE][0].recipe.to_dict()
    assert set(variants.VARIANTS) == {name for group in variants.GROUPS.values() for name in group} - {variants.CENTRE}
    folders = {task.folder for group in tasks.values() for task in group.values()}
    assert len(folders) == 2 * len(tasks), "two variants share a folder"
    for name in variants.VARIANTS:
        changed = tasks[name][0].recipe
        assert changed.method.draw(25, torch.Generator().manual_seed(0)).outputs
        changes = {key for key, value in changed.to_dict().items() if value != centre[key]}
        assert changes <= {"method", "objective", "output"}, (name, changes)
        assert changes > {"output"}, f"{name} is the centre"
    for index, group in enumerate(tasks.values()):
        for seed, task in group.items():
            invented(task, index / 100 + seed / 1000, 0.5, seed)
    findings = variants.findings(ablations.collect_results(options)["runs"], [0, 1])
    assert (
        findings[0].verdict
        == "does not reappear: the opposite for leapalign - alpha 0, reward, leapalign - alpha 1, reward"
    )
    assert findings[1].verdict == "not decided by these seeds", "all norms are equal"
    assert ablations.main(replace(options, variants=("alpha 1", "no weights"))) == 0
    result = json.loads((options.output / "ablations.json").read_text())
    assert result["complete"]
    assert result["runs"]["alpha 1"]["0"][variants.NORM] == 1, "the median"
    assert list(result["groups"].values()) == [["leapalign", "alpha 1"], ["no weights", "leapalign"]]
    assert (options.output / "ablations.png").stat().st_size > 10_000
    assert "INCOMPLETE" not in (options.output / "ablations.md").read_text()
