"""The GPU script runs on the CPU with tiny models; a failing section does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine import gpu, gpu_measure
from benchmarks.engine.gpu_models import Scale


def test_memory_modes_agree_with_the_hand_written_loop(tmp_path: Path) -> None:
    assert gpu.main(gpu.Options(sections=("agreement",), small=True, output=tmp_path)) == 0
    section = json.loads((tmp_path / "gpu.json").read_text())["sections"]["agreement"]
    assert section["state"] == "complete"
    for mode in ("by hand, again", "retain", "staged"):
        row = section["figures"][mode]
        assert row["x0_equal"]
        assert row["finite"]
        assert row["gradient_apart"] < 1e-2  # bfloat16
    assert "| retain | x0_equal True" in (tmp_path / "gpu.md").read_text()


def test_a_section_over_its_limit_is_stopped_and_the_next_one_is_not_begun(tmp_path: Path) -> None:
    stopped = gpu.Section("agreement", gpu.Options(small=True), tmp_path, 0.5).result()
    assert stopped["state"] == "stopped after 0 s"
    assert gpu.main(gpu.Options(sections=("agreement",), small=True, limit=1, output=tmp_path)) == 1
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections["agreement"]["state"].startswith("not begun")


def test_a_measurement_that_raises_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    record = gpu_measure.Record(tmp_path / "figures.json", "some section")

    def fail() -> None:
        raise ValueError("out of something")

    gpu_measure.attempted(record, "first", fail)
    assert gpu_measure.attempted(record, "second", lambda: gpu_measure.Meter(Scale(small=True)).run(lambda: None))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == {"first": {"error": "ValueError: out of something"}}


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there are agreement, time"):
        gpu.main(gpu.Options(sections=("colour",), output=tmp_path))
