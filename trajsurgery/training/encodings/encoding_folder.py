"""A folder of encoded prompts: one safetensors file each, read memory-mapped, shared by ranks and by later runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8

from trajsurgery.errors import RecipeError
from trajsurgery.training.distributed import ranks

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is removed
    fcntl = None

LOCK = "in-use.lock"
Entry = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and plain facts about them."""


class EncodingFolder:
    """The entries that one pipeline wrote, by key. A file is written whole or not at all, and never changed.

    Files hold tensors and JSON; reading them executes nothing. Tensors are views of the mapped file: their memory is
    the operating system's page cache, which it takes back when it needs it.
    """

    def __init__(self, folder: Path, source: str, limit: float = float("inf")) -> None:
        """Open the folder; all ranks call this together.

        Args:
            source: hash of what determines the encodings (`encoder_fingerprint.fingerprint`).
            limit: GiB. What was unused longest is removed until the folder holds no more, unless a run uses it.

        Raises:
            RecipeError: the folder can't be made.
        """
        self.folder, self.source = folder.absolute(), source
        with self._clear_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        if ranks.is_main():
            with _exclusive(self.folder) as alone:
                if alone:
                    remove_unused(self.folder, limit)
        ranks.wait_for_all()
        lock = _locked(self.folder, "LOCK_SH")
        if lock is not None:
            weakref.finalize(self, lock.close)

    def path(self, key: Sequence[str]) -> Path:
        """Return the file of a key."""
        return self.folder / f"{hashlib.sha256(json.dumps([self.source, *key]).encode()).hexdigest()}.safetensors"

    def read(self, key: Sequence[str], check: bool = False) -> Entry | None:
        """Return an entry whose tensors are mapped; None if there is none, or a file of the wrong length.

        Args:
            check: read the content whole, and remove the entry if it is not what was written.
        """
        try:
            with safe_open(self.path(key), "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        digest = facts.pop("sha256", None)
        if check and digest != _digest(tensors, facts):
            with self._clear_errors():
                self.path(key).unlink(missing_ok=True)
            return None
        return tensors, facts

    def exists(self, key: Sequence[str]) -> bool:
        """Whether there is a file of this key."""
        return self.path(key).exists()

    def is_whole(self, key: Sequence[str]) -> bool:
        """Whether the entry's content is what was written. Marks it as used now; removes a damaged one."""
        whole = self.read(key, check=True) is not None
        with contextlib.suppress(OSError):  # others' folder: read, never written
            os.utime(self.path(key))
        return whole

    def write(self, key: Sequence[str], tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write an entry under a temporary name, flush it to disk and rename it.

        Raises:
            RecipeError: the disk is full, the folder is read-only, ...
        """
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        content = save(whole, {"facts": json.dumps({**facts, "sha256": _digest(whole, facts)})})
        path = self.path(key)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        with self._clear_errors():
            try:
                with partial.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)

    def check_room(self, count: int, like: Sequence[Sequence[str]]) -> None:
        """Raise if so many more prompts don't fit on the disk.

        Args:
            like: keys of one prompt whose entries exist.

        Raises:
            RecipeError: they don't.
        """
        one = sum(self.path(key).stat().st_size for key in like if self.exists(key))
        if count * one > self._free():
            raise RecipeError(self._message(f"{count} prompts take {count * one / 2**30:.1f} GiB"))

    def _free(self) -> int:
        existing = next(place for place in (self.folder, *self.folder.parents) if place.exists())
        return shutil.disk_usage(existing).free

    def _message(self, reason: str) -> str:
        return (
            f"encoded prompts can't be written to {self.folder}: {reason} ({self._free() / 2**30:.1f} GiB are free "
            "there). Make room, or pass --prompt-cache with a folder on another disk, or --prompt-cache none, which "
            "leaves them in the host's memory."
        )

    @contextmanager
    def _clear_errors(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise RecipeError(self._message(error.strerror or str(error))) from error


def remove_unused(folder: Path, limit: float) -> None:
    """Remove the files of killed writers, and what was unused longest until `folder` holds at most `limit` GiB."""
    for path in folder.glob("*.partial"):
        path.unlink(missing_ok=True)
    entries = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*.safetensors"))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= limit * 2**30:
            break
        path.unlink(missing_ok=True)
        total -= size


@contextmanager
def _exclusive(folder: Path) -> Generator[bool]:
    """Hold the folder's lock alone for the block; yield whether no other run holds it."""
    lock = _locked(folder, "LOCK_EX")
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.close()


def _locked(folder: Path, way: str) -> IO[bytes] | None:
    """Lock the folder until the file is closed or the process ends; None if it can't be locked (so) now."""
    if fcntl is None:
        return None
    try:
        file = (folder / LOCK).open("ab")
    except OSError:  # others' folder: read, never written
        return None
    for _ in range(100 if way == "LOCK_SH" else 1):  # whoever holds it alone is removing files
        try:
            fcntl.flock(file, getattr(fcntl, way) | fcntl.LOCK_NB)
            return file
        except OSError:
            time.sleep(0.1 if way == "LOCK_SH" else 0)
    file.close()
    return None


def _digest(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(uint8).numpy().data)
    return digest.hexdigest()
