"""What the benchmarks compare is the same work, and what they count is what is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/overhead.py, imported as it is when it is run."""
    monkeypatch.syspath_prepend(str(HERE))
    spec = importlib.util.spec_from_file_location("overhead", HERE / "overhead.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_a_hand_written_algorithm_1_does_the_same_work(overhead: Any) -> None:
    bench = overhead.Bench(overhead.Options(steps=5, batch=1, k=4, j=2))
    assert overhead.agreement(bench)["gradients"] < 1e-4


def test_the_peak_counts_storages_while_they_live(overhead: Any) -> None:
    kept = torch.ones(1000)
    with overhead.Peak() as peak:
        a = kept + 1
        view = a[:10]
        del a
        b = view * 2
        assert peak.now == 4000 + 40
        del view
        c = torch.zeros(500)
        assert peak.now == 40 + 2000
        kept.add_(1)
    assert peak.most == 4000 + 40
    assert len(b) + len(c) == 510


def test_provenance_names_no_folder(overhead: Any) -> None:
    found = sys.modules["provenance"].provenance()
    assert found["command"].startswith("python benchmarks/")
    assert found["versions"].keys() >= {"python", "torch", "diffusers", "trajsurgery"}
    assert found["machine"]["cores"] >= 1


def test_decodes_with_and_without_recomputing_have_one_gradient(overhead: Any) -> None:
    decode = importlib.import_module("decode")
    norms = [decode.decoding(64, name)["gradient_norm"] for name in decode.WAYS]
    assert norms[0] == 0
    assert norms[1] > 0
    assert norms[2:] == pytest.approx([norms[1]] * 2, rel=1e-4)  # an image smaller than a tile is one
