"""Files are whole or not there, a folder belongs to one run, and what the file system refuses is one clear error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.builders import toy_world
from tests.builders.saved_runs import assert_same_run
from trajsurgery import RecipeError
from trajsurgery.cli.train_command import main
from trajsurgery.errors import OutputError
from trajsurgery.training.checkpoints.checkpoint import list_checkpoints, resume
from trajsurgery.training.checkpoints.output_files import OWNER, lock_folder, write_atomically
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.tensor_folder import damage, write_folder
from trajsurgery.training.checkpoints.training_state import TrainingState

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Stands in for SIGKILL inside one process."""


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda partial: partial.write_text("old"))

    def write_half(partial: Path) -> None:
        partial.write_text("ne")
        raise Killed

    with pytest.raises(Killed):
        write_atomically(path, write_half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


HOLD = """
import sys, time
from pathlib import Path
from trajsurgery.training.checkpoints.output_files import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_run_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        recipe = toy_world.recipe(tmp_path, iterations=1)
        refusal = rf"{tmp_path} is in use by process {holder.pid} of .* on .*, since 20.*--output"
        with pytest.raises(RecipeError, match=refusal):
            main(recipe, toy_world.world(recipe))
        assert not (tmp_path / METRICS).exists()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        assert main(recipe, toy_world.world(recipe)) is not None
        assert not (tmp_path / OWNER).exists()
    finally:
        holder.kill()
        holder.wait(10)
        holder.stdout.close()


def test_a_lock_is_freed_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), lock_folder(tmp_path):
        raise ValueError("inside")
    with lock_folder(tmp_path):
        pass


SCRIPT = """
import resource, signal, sys, torch
from dataclasses import replace
from pathlib import Path
from tests.builders import toy_world
from tests.builders.saved_runs import assert_same_run
from trajsurgery.cli.train_command import main
from trajsurgery.errors import OutputError
torch.set_num_threads(1)
recipe = toy_world.recipe(Path(sys.argv[1]), save_every=2)
main(replace(recipe, iterations=2), toy_world.world(recipe))
world = toy_world.world(recipe)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    main(recipe, world)
except OutputError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.slow
def test_a_write_that_fails_in_a_run_is_one_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    message = done.stdout.strip().splitlines()[-1]
    assert message.startswith(f"{tmp_path / 'run/checkpoints/000004'} can't be written: ")
    assert "MiB are free" in message
    assert "goes on from the last checkpoint" in message
    (newest,) = list_checkpoints(tmp_path / "run")[:1]
    assert (newest.name, damage(newest)) == ("000002", "")
    whole, recipe = (toy_world.recipe(tmp_path / name, save_every=2) for name in ("whole", "run"))
    main(recipe, toy_world.world(recipe))
    main(whole, toy_world.world(whole))
    assert_same_run(whole.output, recipe.output)


def test_a_file_in_the_place_of_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    recipe = toy_world.recipe(tmp_path / "file")
    with pytest.raises(OutputError, match=r"file/run\.lock can't be written: File exists.*--output"):
        main(recipe, toy_world.world(recipe))
    with pytest.raises(OutputError, match=r"can't be written: (File exists|Not a directory)"):
        write_folder(tmp_path / "file" / "folder", {"a": torch.zeros(2)}, {}, {})


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Writes to /dev/full fail as on a full disk."""
    log = Log(tmp_path / METRICS)
    log.path.symlink_to("/dev/full")
    with pytest.raises(OutputError, match=rf"{METRICS} can't be written: {os.strerror(errno.ENOSPC)}"):
        log.append({"kind": "iteration"})


def test_a_folder_that_vanishes_is_one_clear_error(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    (tmp_path / "checkpoints" / "000000").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"no checkpoint in .* is whole"):
        resume(recipe, TrainingState.start(recipe, toy_world.world(recipe).module))
