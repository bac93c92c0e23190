"""The benchmarks compare equal work, and their memory counter is exact."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engine import decode, overhead
from benchmarks.provenance import provenance


def test_a_hand_written_algorithm_1_does_the_same_work() -> None:
    bench = overhead.IterationBench(overhead.Options(steps=5, batch=1, k=4, j=2))
    differences = overhead.check_same_work(bench)
    assert differences.keys() == {"split", "retain"}
    assert all(difference["gradients"] < 1e-4 for difference in differences.values())


def test_split_s_backward_pass_holds_no_second_gradient() -> None:
    bench = overhead.IterationBench(overhead.Options(steps=5, batch=1, k=4, j=2))
    split, retain = (overhead.measure_gradient_memory(bench, memory) for memory in ("split", "retain"))
    assert split <= 0.6 * retain
    parameters = sum(p.numel() * p.element_size() for p in bench.module.parameters())
    assert split < parameters / 4


def test_the_peak_counts_storages_while_they_live() -> None:
    existing = torch.ones(1000)
    with overhead.PeakMemory() as peak:
        a = existing + 1
        view = a[:10]
        del a
        b = view * 2
        assert peak.now == 4000 + 40
        del view
        c = torch.zeros(500)
        assert peak.now == 40 + 2000
        existing.add_(1)
    assert peak.most == 4000 + 40
    assert len(b) + len(c) == 510


def test_provenance_names_no_folder() -> None:
    record = provenance()
    assert record["command"].startswith("python -m benchmarks.")
    assert record["versions"].keys() >= {"python", "torch", "diffusers", "trajsurgery"}
    assert record["machine"]["cores"] >= 1


def test_decodes_with_and_without_recomputing_have_one_gradient() -> None:
    norms = [decode.measure_decode(64, name)["gradient_norm"] for name in decode.WAYS]
    assert norms[0] == 0
    assert norms[1] > 0
    assert norms[2:] == pytest.approx([norms[1]] * 2, rel=1e-4)  # an image smaller than a tile is one tile
