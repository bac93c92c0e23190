"""A reward's weights: their file, given or in the local Hugging Face cache, and loading it. Nothing is downloaded.

Loading takes an original's state dict to our names, towers and heads of linear layers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from trajsurgery.errors import RewardError

SHA256 = {
    "sac+logos+ava1-l14-linearMSE.pth": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    "openai/clip-vit-large-patch14/model.safetensors": (
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
    ),
}
"""Checksums of known files: of a repository's file, which is checked in the cache, or of a file wherever it is."""


WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".gguf")
"""What files of weights end in."""


def find_file(reward: str, path: str | Path | None, repository: str, file: str) -> Path:
    """Return the given file, else that of the repository in the cache.

    Raises:
        RewardError: it is missing; how to get it.
    """
    if path is None and (cached := cached_file(repository, file)):
        return check_sha256(reward, cached, f"{repository}/{file}")
    if path is not None and Path(path).is_file():
        return check_sha256(reward, Path(path), Path(path).name)
    if path is not None:
        raise RewardError(f"{reward}: there is no file {path}. It takes {file} of the hub's {repository}.")
    raise RewardError(
        f"{reward}: its weights are not in the Hugging Face cache. `hf download {repository} {file}` fetches them and "
        "prints where they are, or pass their file."
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
    if cached is None and is_local(place):
        raise RewardError(f"{reward}: there is no folder {place}. It takes what transformers' save_pretrained wrote.")
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


def rename_weights(
    reward: str, names: Sequence[tuple[str, str]], unused: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an original's state dict under our names, without what no score looks at.

    Args:
        names: regular expressions for the originals' names, and what to put in place of the match.
        unused: one for names to leave out.

    Raises:
        RewardError: a name that the original does not have.
    """
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        if re.match(unused, key):
            continue
        ours = next((re.sub(pattern, name, key) for pattern, name in names if re.match(pattern, key)), None)
        if ours is None:
            raise RewardError(f"{reward}: the file holds {key!r}, which the original's does not.")
        weights[ours] = value
    return weights


def load_part(path: Path, part: nn.Module, weights: Mapping[str, Tensor], what: str, assign: bool = False) -> None:
    """Load weights into a module.

    Args:
        assign: the module takes the tensors themselves, with their dtype and device.

    Raises:
        RewardError: they are not all of its weights, or others.
    """
    try:
        part.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        raise RewardError(f"{path.name} does not hold {what}: {error}") from error


def weights_under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def linear_head(reward: str, state: Mapping[str, Tensor], width: int) -> nn.Sequential:
    """Build the layers of a state dict, in the order of the numbers in their names.

    Dropout layers, which have numbers and no weights, are left out.

    Args:
        width: input width.

    Raises:
        RewardError: the layers do not fit one another, or do not end in one number.
    """
    names = [key.removesuffix("weight") for key in state if key.endswith("weight")]
    names.sort(key=lambda name: int(re.sub(r"\D", "", name) or 0))
    layers = nn.Sequential()
    for name in names:
        weight = state[f"{name}weight"]
        if weight.dim() != 2 or weight.shape[1] != width or f"{name}bias" not in state:
            break
        layer = nn.Linear(width, len(weight), device=weight.device)
        layer.load_state_dict({"weight": weight, "bias": state[f"{name}bias"]})
        layers.append(layer)
        width = len(weight)
    if not names or len(layers) < len(names) or len(state) != 2 * len(names) or width != 1:
        shapes = {key: list(value.shape) for key, value in state.items()}
        raise RewardError(f"{reward}: these are not the linear layers of its head: {shapes}.")
    return layers


def is_local(place: str | Path) -> bool:
    """Whether a name is a path of this machine, not a hub id (OWNER/NAME), whether or not it exists."""
    text, path = str(place), Path(place)
    if text.startswith((".", "/", "~")) or text.endswith(("/", *WEIGHT_FILES)) or text.count("/") > 1 or "\\" in text:
        return True
    return path.exists() or ("/" in text and path.parent.is_dir())
