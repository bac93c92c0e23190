"""A rank that raises or dies stops all ranks soon, with its cause on the screen, and the run goes on afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import failing_rank, toy_world
from trajsurgery.cli import train_command
from trajsurgery.training.checkpoints.run_log import METRICS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("how, cause", [("raises", "the reward's model is gone"), ("dies", "SIGKILL")])
def test_a_failing_rank_stops_all_and_the_run_goes_on_on_one(how: str, cause: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "tests.builders.failing_rank", str(tmp_path / "run"), how),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    assert cause in done.stdout + done.stderr
    recipe = failing_rank.recipe(tmp_path / "run")
    assert train_command.main(recipe, toy_world.world(recipe)) is not None
    lines = [json.loads(line) for line in (recipe.output / METRICS).read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "iteration"] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["kind"] == "evaluation"
