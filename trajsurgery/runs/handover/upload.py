"""Upload an exported folder to the hub."""

from __future__ import annotations

from pathlib import Path

from trajsurgery.errors import OutputError


def upload(folder: Path, repository: str, private: bool) -> str:
    """Create the repository USER/NAME if it is not there, upload the folder, and return its address.

    Raises:
        OutputError: no network, no token, or the hub refuses; the folder on the disk is whole.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights tuned with trajsurgery")
    except Exception as error:  # of the hub's client, its HTTP library and the network: all end the same way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutputError(
            f"{repository} was not uploaded: {reason} {folder} is whole. Check the network, `hf auth login` and "
            f"HF_HUB_OFFLINE, then: hf upload {repository} {folder}"
        ) from error
    return str(address)
