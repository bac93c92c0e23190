"""Folders of tensors on disk, each whole or not there. SHA256SUMS has a checksum of every file, for `sha256sum -c`.

Sharded tensors are written by all ranks with torch.distributed.checkpoint, and any number of ranks reads them; the
others are written by the first rank with torch.save. All ranks see the same disk, and call these functions together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from trajsurgery.training.checkpoints.output_files import flush_to_disk, storage_errors
from trajsurgery.training.distributed import ranks, sharding

ABOUT, STATE, SUMS = "about.json", "state.pt", "SHA256SUMS"


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write a folder under another name, flush it to disk and rename it.

    Args:
        tensors: by name; sharded ones (DTensor) are written by all ranks.
        state: of the first rank: numbers, strings, and tensors that are no shards.
        about: of the first rank: what a person may want to read (JSON).

    Raises:
        OutputError: the file system refuses; nothing of the folder is there then.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    with storage_errors(folder):
        try:
            if ranks.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            ranks.wait_for_all()
            sharded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
            if sharded:
                _save_sharded(partial, sharded)
            if ranks.is_main():
                others = {name: tensor for name, tensor in tensors.items() if name not in sharded}
                torch.save({"tensors": others, "state": dict(state)}, partial / STATE)
                (partial / ABOUT).write_text(json.dumps(dict(about), indent=1) + "\n")
                flush_to_disk(partial / STATE)
                flush_to_disk(partial / ABOUT)
            ranks.wait_for_all()
            sums = _of_all_ranks(_checksums(partial))
            if ranks.is_main():
                (partial / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
                flush_to_disk(partial / SUMS)
                flush_to_disk(partial)
                _replace(folder, partial)
        except BaseException:
            if ranks.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            raise
    ranks.wait_for_all()


def _save_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save(dict(tensors), storage_writer=FileSystemWriter(folder, sync_files=True))
    except CheckpointException as error:  # what the file system said to one of the ranks
        raise next(iter(error.failures.values()))[0] from error


def _replace(folder: Path, new: Path) -> None:
    """Put a new folder in the place of one that may be there. If the process is killed between the two renames,
    `recover_replaced` takes the old one back.
    """
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_replaced(parent: Path) -> None:
    """Take back a folder whose replacement was interrupted."""
    for old in parent.glob("*.old"):
        folder = old.with_suffix("")
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, folder)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of this rank's share of the files."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return {path.name: _sha256(path) for path in files[ranks.rank() :: ranks.count()]}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_all_ranks(sums: dict[str, str]) -> dict[str, str]:
    return {name: digest for part in ranks.gathered(sums) for name, digest in part.items()}


def damage(folder: Path) -> str:
    """Return what is wrong with a folder; "" if it is whole."""
    sums, unreadable = dict[str, str](), ""
    try:
        lines = (folder / SUMS).read_text().strip("\n").split("\n")
        expected = {name: digest for digest, name in (line.split("  ") for line in lines)}
        sums = _checksums(folder)
    except (OSError, ValueError) as error:
        expected, unreadable = {}, f"{type(error).__name__}: {error}"
    sums, unreadable = _of_all_ranks(sums), next(filter(None, ranks.gathered(unreadable)), "")
    differing = sorted(name for name in {*expected, *sums} if expected.get(name) != sums.get(name))
    return unreadable or (f"{', '.join(differing)}: not as written" if differing else "")


def read_about(folder: Path) -> dict[str, Any]:
    """Return what a person may read of a folder."""
    return json.loads((folder / ABOUT).read_text())


def read_state(folder: Path) -> dict[str, Any]:
    """Return the folder's `state`, on the CPU. Nothing in the file is executed."""
    return _of_first_rank(folder)["state"]


def _of_first_rank(folder: Path) -> dict[str, Any]:
    return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)


def _sharded(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes (`.size`) and dtypes (`.properties.dtype`) of the tensors that were sharded."""
    if not (folder / ".metadata").exists():
        return {}
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def tensor_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return the shapes of the folder's tensors, by name."""
    others: dict[str, Tensor] = _of_first_rank(folder)["tensors"]
    sharded = {name: entry.size for name, entry in _sharded(folder).items()}
    return {name: tensor.shape for name, tensor in others.items()} | sharded


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Set tensors to those of the folder, each rank its shards, on any number of ranks.

    Raises:
        ValueError: names or shapes differ.
    """
    saved, wanted = tensor_shapes(folder), {name: tensor.shape for name, tensor in tensors.items()}
    differing = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{len(differing)} tensors differ, the first is {name}: shape {_shape(saved.get(name))} in the folder, "
            f"{_shape(wanted.get(name))} in this run"
        )
    others: dict[str, Tensor] = _of_first_rank(folder)["tensors"]
    _load(folder, {name: tensor for name, tensor in tensors.items() if name not in others})
    with torch.no_grad():
        for name, value in others.items():
            tensors[name].copy_(sharding.shard_of(value, tensors[name]))


def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    if tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=FileSystemReader(folder), no_dist=ranks.count() == 1)


def _shape(size: torch.Size | None) -> str:
    return "none" if size is None else str(tuple(size))


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the whole tensors whose names begin with `prefix`, without it, on the CPU."""
    sharded = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in _sharded(folder).items()}
    sharded = {name: tensor for name, tensor in sharded.items() if name.startswith(prefix)}
    _load(folder, sharded)
    others: dict[str, Tensor] = _of_first_rank(folder)["tensors"]
    return {name.removeprefix(prefix): t for name, t in (others | sharded).items() if name.startswith(prefix)}
