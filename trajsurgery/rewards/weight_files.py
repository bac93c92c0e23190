"""Find a reward's weights: a given file or folder, or the local Hugging Face cache. Nothing is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from trajsurgery.errors import RewardError

SHA256 = {
    "sac+logos+ava1-l14-linearMSE.pth": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    "openai/clip-vit-large-patch14/model.safetensors": (
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
    ),
}
"""Checksums of known files: the first of each is its repository's, the second as others publish it. A repository's file
is
checked in the cache; one that has its own name, wherever it is.
"""


def find_file(reward: str, path: str | Path | None, repository: str, file: str) -> Path:
    """Return the given file, else that of the repository in the cache.

    Raises:
        RewardError: it is missing; how to get it.
    """
    if path is not None:
        if Path(path).is_file():
            return check_sha256(reward, Path(path), Path(path).name)
        raise RewardError(
            f"{reward}: there is no file {path}. `hf download {repository} {file}` prints where it puts it."
        )
    cached = cached_file(repository, file)
    if cached is None:
        raise RewardError(
            f"{reward}'s weights are not in the Hugging Face cache: `hf download {repository} {file}` fetches them, or "
            "pass their file."
        )
    return check_sha256(reward, cached, f"{repository}/{file}")


def find_folder(reward: str, place: str | Path | None, repository: str, file: str = "config.json") -> Path:
    """Return the given folder, or that of the given repository (else the usual one) in the cache.

    Args:
        file: a file that it must hold.

    Raises:
        RewardError: it is missing, or holds no such file; how to get it.
    """
    repository_or_path = str(place or repository)
    if Path(repository_or_path).is_dir():
        if (Path(repository_or_path) / file).is_file():
            return Path(repository_or_path)
        raise RewardError(
            f"{reward}: the folder {repository_or_path} has no {file}: it takes what transformers' save_pretrained "
            "wrote."
        )
    cached = cached_file(repository_or_path, file)
    if cached is None:
        raise RewardError(
            f"{reward}: {repository_or_path} is neither a folder nor in the Hugging Face cache: "
            f"`hf download {repository_or_path}` fetches it, or pass a folder."
        )
    for name in SHA256:
        if name.rpartition("/")[0] == repository_or_path and (cached.parent / name.rpartition("/")[2]).is_file():
            check_sha256(reward, cached.parent / name.rpartition("/")[2], name)
    return cached.parent


def check_sha256(reward: str, path: Path, name: str) -> Path:
    """Return the path if its sha256 matches the known one, or none is known.

    Raises:
        RewardError: it does not match.
    """
    expected = SHA256.get(name)
    if expected is not None:
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != expected:
            raise RewardError(
                f"{reward}: {path} is not the file that it is named after: its sha256 is {got}, expected {expected}. "
                "It was cut off or changed: fetch it again, or give a file of your own another name, a model of "
                "your own as a folder."
            )
    return path


def cached_file(repository: str, file: str) -> Path | None:
    """Return the file of a repository in the local Hugging Face cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, file)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None
