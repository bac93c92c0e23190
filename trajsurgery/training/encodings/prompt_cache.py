"""Encode each prompt once: cache what the pipeline's own `encode_...` methods return, in memory or on disk.

This works for any pipeline class. The pipeline's `__call__` runs up to the first transformer call, which makes all
calls of its `encode_...` methods. Encoding one prompt twice shows which dimension of a result counts prompts. A prompt
takes 4 MiB for FLUX.1-dev's 512 tokens. Encodings lie in a folder (encoding_folder.py), which the ranks of a run fill
together and later runs read, or in the memory of the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from trajsurgery.pipelines.call_record import encoder_methods
from trajsurgery.training.distributed import ranks
from trajsurgery.training.encodings.cached_encoder import CachedEncoder, EncoderState
from trajsurgery.training.encodings.encoder_fingerprint import fingerprint
from trajsurgery.training.encodings.encoding_folder import EncodingFolder

_PLACE = "_encodings_of_trajsurgery"
_PROBE = "a probe"


class PromptCache:
    """Encodings of a list of prompts, each made once. Calling it returns arguments for the pipeline.

    With a folder of encodings (`open_folder`) all ranks create this together, and each encodes its share.
    """

    def __init__(self, pipe: Any, texts: Iterable[str], call: Mapping[str, Any] | None = None, batch: int = 64) -> None:
        self._length = _sequence_length(pipe)
        encodings = PipelineEncodings.of(pipe)
        unique = [text for text in dict.fromkeys(texts) if text not in encodings.texts]
        if unique:
            encodings.prepare(unique, {**(call or {}), **self._length}, batch)

    def __call__(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return pipeline arguments for these prompts; the pipeline then encodes none of them."""
        return {"prompt": list(texts), **self._length}


def open_folder(pipe: Any, folder: Any, limit: float) -> None:
    """From now on write a pipeline's encodings to a folder, and read them from it; all ranks call this together.

    Args:
        folder: a path. What other pipelines wrote there is never taken for this one's.
        limit: GiB; see `EncodingFolder`.

    Raises:
        RecipeError: the folder can't be made, or the pipeline's encoders can't be identified.
    """
    PipelineEncodings.of(pipe).state.folder = EncodingFolder(folder, fingerprint(pipe), limit)


def _sequence_length(pipe: Any) -> dict[str, int]:
    """Return the number of tokens that the pipeline encodes, at most what its T5 tokenizer allows."""
    taken = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    names = [name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if getattr(pipe, name, None) is not None]
    if taken is None or not names or not isinstance(taken.default, int):
        return {}
    return {taken.name: min(taken.default, getattr(pipe, names[0]).model_max_length)}


def free_text_encoders(pipe: Any, place: torch.device | str = "cpu") -> tuple[str, ...]:
    """Move the text encoders to `place` and take them off the pipeline; return their names.

    Their memory is freed unless somebody else holds them. The pipeline can't encode new prompts afterwards.
    """
    state = PipelineEncodings.of(pipe).state
    for name in state.encoders:
        getattr(pipe, name).to(place)
        setattr(pipe, name, None)
    names, state.gone = tuple(sorted(state.encoders)), True
    state.encoders.clear()
    return names


class PipelineEncodings:
    """The cached results of one pipeline's `encode_...` methods. It replaces those methods on the pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.state = pipe, EncoderState(pipe)
        self.texts: set[str] = set()
        """Prompts that were encoded in advance."""
        for owner, name in list(encoder_methods(pipe, type(pipe))):
            if owner is pipe:
                pipe.__dict__[name] = CachedEncoder(self.state, getattr(pipe, name))

    @classmethod
    def of(cls, pipe: Any) -> PipelineEncodings:
        """Return the cache of a pipeline; create it the first time."""
        if _PLACE not in pipe.__dict__:
            pipe.__dict__[_PLACE] = cls(pipe)
        return pipe.__dict__[_PLACE]

    def prepare(self, texts: Sequence[str], call: Mapping[str, Any], batch: int) -> None:
        """Encode prompts that are not stored; with a folder each rank encodes its share of them."""
        if self.state.folder is None:
            self._encode_all(texts, call, batch)
        else:
            self._fill(self.state.folder, texts, call, batch)
        self.texts.update(texts)

    def _fill(self, folder: EncodingFolder, texts: Sequence[str], call: Mapping[str, Any], batch: int) -> None:
        """Check and write this rank's share of a folder's entries; then wait for the others', and encode what is amiss.

        What is amiss then are folders that ranks do not share, and entries that another kind of GPU wrote.
        """
        self.state.calls = calls = list[tuple[CachedEncoder, dict[str, Any]]]()
        self.encode([_PROBE], call)
        self.state.calls = None

        def keys(text: str) -> list[tuple[str, ...]]:
            return [key for encoder, arguments in calls for key in encoder.keys(_with_prompt(arguments, text))[1]]

        # of a pipeline that changes a prompt before it encodes it, the keys are not known here
        known = any(_with_prompt(arguments, "") != arguments for _, arguments in calls)
        first, every = ranks.rank(), ranks.count()
        missing = [text for text in texts[first::every] if not known or not all(map(folder.is_whole, keys(text)))]
        folder.check_room(len(missing) * every, keys(_PROBE))
        self._encode_all(missing, call, batch)
        ranks.wait_for_all()
        others = [text for i, text in enumerate(texts) if i % every != first]
        amiss = [text for text in others if not known or not all(map(folder.exists, keys(text)))]
        self._encode_all(amiss, call, batch)

    def _encode_all(self, texts: Sequence[str], call: Mapping[str, Any], batch: int) -> None:
        for start in range(0, len(texts), batch):
            self.encode(texts[start : start + batch], call)

    def encode(self, texts: Sequence[str], call: Mapping[str, Any]) -> None:
        """Run the pipeline for these prompts up to the first transformer call, which encodes all of them."""

        def reached(*_: Any) -> None:
            raise _LoopReached

        hook = self.pipe.transformer.register_forward_pre_hook(reached, prepend=True)  # before FSDP gathers weights
        try:
            self.pipe(prompt=list(texts), **call, num_inference_steps=2, generator=torch.Generator())
        except _LoopReached:
            pass
        finally:
            hook.remove()


def _with_prompt(arguments: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return an encoder's arguments for another prompt than the probe."""
    return {name: [text] if value == [_PROBE] else value for name, value in arguments.items()}


class _LoopReached(BaseException):
    """The pipeline has reached its denoising loop."""
