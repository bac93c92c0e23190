"""Files of a run: written whole or not at all, locked by one run at a time, with clear errors of the file system."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from trajsurgery.errors import OutputError, RecipeError
from trajsurgery.training.distributed import ranks

LOCK, OWNER = "run.lock", "run.lock.json"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(partial_path)`, flush to disk and rename: if the process is killed, the old file stays.

    Of several ranks the first one writes.

    Raises:
        OutputError: the file system refuses.
    """
    if not ranks.is_main():
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            flush_to_disk(partial)
            os.replace(partial, path)
            flush_to_disk(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turn what the file system refuses in the block into one error that says what to do.

    Raises:
        OutputError: the disk is full, the folder is read-only or gone, a file stands where a folder should be, ...
    """
    try:
        yield
    except OSError as error:
        raise OutputError(_message(path, error.strerror or str(error))) from error
    except SafetensorError as error:
        raise OutputError(_message(path, str(error))) from error
    except RuntimeError as error:  # torch's writer does not say what the file system said
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OutputError(_message(path, str(error))) from error


def _message(path: Path, reason: str) -> str:
    existing = next((folder for folder in path.absolute().parents if folder.is_dir()), Path(path.anchor or "/"))
    free = shutil.disk_usage(existing).free / 2**20
    return (
        f"{path} can't be written: {reason} ({free:,.0f} MiB are free there). What was saved before is whole. "
        "Make room or mend the folder, and the same command goes on from the last checkpoint; or pass --output with "
        "another folder."
    )


@contextmanager
def lock_folder(folder: Path) -> Generator[None]:
    """Keep other runs out of a folder for the block. The operating system frees the lock of a process that dies.

    Of several ranks the first one holds the lock. All ranks call this together.

    Raises:
        RecipeError: another process holds it; says which, where and since when.
        OutputError: the folder can't be made.
    """
    lock, refusal = FileLock(folder / LOCK, timeout=0), None
    if ranks.is_main():
        try:
            with storage_errors(folder / LOCK):
                folder.mkdir(parents=True, exist_ok=True)
                with suppress(Timeout):  # another process holds it
                    lock.acquire()
            if not lock.is_locked:
                way_out = "Wait for it, stop it, or pass --output with another folder."
                refusal = RecipeError(f"{folder} is in use by {_owner(folder)}. {way_out}")
        except OutputError as error:
            refusal = error
    refusal = ranks.gathered(refusal)[0]
    if refusal is not None:
        raise refusal
    try:
        if ranks.is_main():
            owner = {"process": os.getpid(), "user": _user(), "host": socket.gethostname()}
            text = json.dumps(owner | {"since": datetime.now().astimezone().isoformat(timespec="seconds")})
            write_atomically(folder / OWNER, lambda partial: partial.write_text(text + "\n"))
        yield
    finally:
        if ranks.is_main():
            (folder / OWNER).unlink(missing_ok=True)
            lock.release()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text())
    except (OSError, ValueError):  # it starts or ends just now
        return "another run"
    return f"process {owner['process']} of {owner['user']} on {owner['host']}, since {owner['since']}"
