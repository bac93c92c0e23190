"""What determines a pipeline's prompt encodings, as one hash: code, versions, settings and the bytes of all weights."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from trajsurgery.errors import RecipeError

UNUSED = ("transformer", "transformer_2", "vae", "scheduler")
"""Components that encode no prompts."""

_WORDS = 2**20


def fingerprint(pipe: Any) -> str:
    """Return a hash of everything that determines what the pipeline's `encode_...` methods return for a prompt.

    The weights of text encoders are read where they lie, whole (milliseconds for 10 GB on a GPU, seconds on a CPU), so
    that a model that moved to another folder has the same hash, and a changed weight another one.

    Raises:
        RecipeError: a component can't be hashed.
    """
    kind, device = type(pipe), pipe.transformer.device
    identity: dict[str, Any] = {
        "pipeline": [f"{kind.__module__}.{kind.__qualname__}", _source(kind)],
        "versions": [diffusers.__version__, transformers.__version__, torch.__version__],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "matmul": torch.get_float32_matmul_precision(),
        "settings": _plain(dict(pipe.config)) | _plain(vars(pipe)),
    }
    for name, part in sorted(pipe.components.items()):
        if name not in UNUSED and part is not None:
            try:
                identity[name] = _module(part) if isinstance(part, nn.Module) else _files(part)
            except Exception as error:  # a class without weights or files, a full disk, ...
                raise RecipeError(
                    f"the pipeline's {name} ({type(part).__name__}) can't be identified ({error}), so that prompts it "
                    "encodes can't be shared on disk. --prompt-cache none leaves them in the host's memory."
                ) from error
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's 64-bit words, each times an odd number of its position, modulo 2^64 (Int64[]).

    Any single changed word changes it. It is computed where the tensor lies, without waiting for the device.
    """
    data = tensor.detach().clone(memory_format=torch.contiguous_format) if _is_unaligned(tensor) else tensor.detach()
    data = data.flatten().view(torch.uint8)
    whole = len(data) // 8 * 8
    rest = nn.functional.pad(data[whole:], (0, 8 - len(data) + whole)).view(torch.int64)
    words, total = data[:whole].view(torch.int64), rest.sum()
    factors = torch.arange(3, 2 * min(_WORDS, len(words)) + 3, 2, device=data.device)
    for start in range(0, len(words), _WORDS):
        part = words[start : start + _WORDS]
        total = total + (part * (factors[: len(part)] + 2 * start)).sum()
    return total


def _is_unaligned(tensor: Tensor) -> bool:
    return bool(not tensor.is_contiguous() or tensor.storage_offset() * tensor.element_size() % 8)


def _module(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    settings.pop("_name_or_path", None)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in sorted(tensors.items())]
    sums = [checksum(tensor) for _, tensor in sorted(tensors.items())]
    kernel = str(getattr(config, "_attn_implementation", None))
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return [kind, json.dumps(settings, sort_keys=True, default=str), kernel, shapes, torch.stack(sums).tolist()]


def _files(part: Any) -> Any:
    """Return the hashes of the files that a tokenizer or processor saves."""
    with TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        hashes = [[path.name, hashlib.sha256(_content(path)).hexdigest()] for path in files]
    return [f"{type(part).__module__}.{type(part).__qualname__}", hashes]


def _content(path: Path) -> bytes:
    """Return what a file holds, without the truncation and padding of a tokenizer's latest call."""
    if path.name != "tokenizer.json":
        return path.read_bytes()
    settings = json.loads(path.read_bytes())
    return json.dumps({name: v for name, v in settings.items() if name not in ("truncation", "padding")}).encode()


def _source(kind: type) -> str:
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):  # a class typed into an interpreter
        return ""


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    kinds = str | int | float | bool | None
    return {name: v for name, v in settings.items() if not name.startswith("_") and isinstance(v, kinds)}
