"""Where a reward's weights are: a file or folder that is named, or the local Hugging Face cache. Nothing is fetched."""

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
"""Of the files whose checksum is known: the first taken of its repository's file, the second as others publish it. A
file of a repository is checked in the cache; one that stands under its own name alone, wherever it is."""


def file_of(reward: str, given: str | Path | None, repository: str, file: str) -> Path:
    """The file that is given, else that of the repository in the cache.

    Raises:
        RewardError: it is not there; how to fetch it.
    """
    if given is not None:
        if Path(given).is_file():
            return verified(reward, Path(given), Path(given).name)
        raise RewardError(
            f"{reward}: there is no file {given}. `hf download {repository} {file}` prints where it puts it."
        )
    found = cached(repository, file)
    if found is None:
        raise RewardError(
            f"{reward}'s weights are not in the Hugging Face cache: `hf download {repository} {file}` fetches them, or "
            "pass their file."
        )
    return verified(reward, found, f"{repository}/{file}")


def folder_of(reward: str, given: str | Path | None, repository: str, file: str = "config.json") -> Path:
    """The folder that is given, or that of the repository (the one given, else the usual one) in the cache.

    Args:
        file: what has to be in it.

    Raises:
        RewardError: it is not there, or holds no such file; how to fetch it.
    """
    asked = str(given or repository)
    if Path(asked).is_dir():
        if (Path(asked) / file).is_file():
            return Path(asked)
        raise RewardError(
            f"{reward}: the folder {asked} has no {file}: it takes what transformers' save_pretrained wrote."
        )
    found = cached(asked, file)
    if found is None:
        raise RewardError(
            f"{reward}: {asked} is neither a folder nor in the Hugging Face cache: `hf download {asked}` fetches it, "
            "or pass a folder."
        )
    for name in SHA256:
        if name.rpartition("/")[0] == asked and (found.parent / name.rpartition("/")[2]).is_file():
            verified(reward, found.parent / name.rpartition("/")[2], name)
    return found.parent


def verified(reward: str, path: Path, name: str) -> Path:
    """The path, if the sha256 that is known under the name is the file's, or none is known.

    Raises:
        RewardError: it is another one.
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


def cached(repository: str, file: str) -> Path | None:
    """The file of a repository in the local Hugging Face cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
