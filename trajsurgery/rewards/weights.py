"""Where a reward's weights are: a file or folder that is named, or the local Hugging Face cache. Nothing is fetched."""

from __future__ import annotations

from pathlib import Path

from trajsurgery.errors import RewardError


def file_of(reward: str, given: str | Path | None, repository: str, file: str) -> Path:
    """The file that is given, else that of the repository in the cache.

    Raises:
        RewardError: it is not there; how to fetch it.
    """
    if given is not None:
        if Path(given).is_file():
            return Path(given)
        raise RewardError(
            f"{reward}: there is no file {given}. `hf download {repository} {file}` prints where it puts it."
        )
    found = cached(repository, file)
    if found is None:
        raise RewardError(
            f"{reward}'s weights are not in the Hugging Face cache: `hf download {repository} {file}` fetches them, or "
            "pass their file."
        )
    return found


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
    return found.parent


def cached(repository: str, file: str) -> Path | None:
    """The file of a repository in the local Hugging Face cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
