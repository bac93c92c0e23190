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
"""Checksums of known files: of a repository's file, which is checked in the cache, or of a file wherever it is."""


def find_file(reward: str, path: str | Path | None, repository: str, file: str) -> Path:
    """Return the given file, else that of the repository in the cache.

    Raises:
        RewardError: it is missing; how to get it.
    """
    if path is None and (cached := cached_file(repository, file)):
        return check_sha256(reward, cached, f"{repository}/{file}")
    if path is not None and Path(path).is_file():
        return check_sha256(reward, Path(path), Path(path).name)
    problem = "its weights are not in the Hugging Face cache" if path is None else f"there is no file {path}"
    raise RewardError(
        f"{reward}: {problem}. `hf download {repository} {file}` fetches them and prints where they are, or pass their "
        "file."
    )


def find_folder(reward: str, place: str | Path, file: str = "config.json") -> Path:
    """Return a folder, or that of a repository in the cache.

    Args:
        place: the folder, or the repository's hub id.
        file: a file that it must hold.

    Raises:
        RewardError: it is missing, or holds no such file; how to get it.
    """
    folder = Path(place)
    if (folder / file).is_file():
        return folder
    if folder.is_dir():
        raise RewardError(
            f"{reward}: the folder {place} has no {file}: it takes what transformers' save_pretrained wrote."
        )
    cached = cached_file(str(place), file)
    if cached is None:
        raise RewardError(
            f"{reward}: {place} is neither a folder nor in the Hugging Face cache: `hf download {place}` fetches it, "
            "or pass a folder."
        )
    for name in SHA256:
        repository, _, known_file = name.rpartition("/")
        if repository == str(place) and (cached.parent / known_file).is_file():
            check_sha256(reward, cached.parent / known_file, name)
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
