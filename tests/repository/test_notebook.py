"""The notebook runs from its first cell to its last, but for the one that installs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs/notebooks/tiny_flux.ipynb"
RUN = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def test_the_notebook_runs_and_its_reward_rises(tmp_path: Path) -> None:
    executed = tmp_path / "executed.ipynb"
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(executed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [cell for cell in json.loads(executed.read_text())["cells"] if cell["cell_type"] == "code"]
    skipped = [cell for cell in cells if "skip-execution" in cell["metadata"].get("tags", ())]
    assert len(skipped) == 1
    assert all(cell["execution_count"] for cell in cells if cell not in skipped)
    texts = "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])
    assert "reward_before" in texts
    assert (tmp_path / "outputs/warmth/report.html").exists()
    lines = (tmp_path / "outputs/warmth/metrics.jsonl").read_text().splitlines()
    evaluation = json.loads(lines[-1])
    assert evaluation["reward_gain"] > 2 * evaluation["reward_gain_se"]
