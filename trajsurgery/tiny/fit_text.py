"""Stage two: the text encoders, alone, as text encoders are: they learn what the training prompts mean.

A throw-away linear head on T5's tokens, and one on CLIP's pooled state, say how likely each quadrant is to hold each
kind of object, or none. Flux then finds relations and bindings in the embeddings and need not teach the encoders.
"""

from collections.abc import Generator as Yields
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from trajsurgery.tiny.layout import KINDS, divergence, layouts
from trajsurgery.tiny.prompt import split_prompts
from trajsurgery.tiny.stage import Budget, Stage
from trajsurgery.tiny.tokenizers import TEXT_LENGTH

BLUR = 0.5  # relative noise on the word embeddings: without it the encoders learn the few hundred prompts by heart


@dataclass(frozen=True)
class Encoders:
    """The two text encoders and their tokenizers."""

    clip: Any
    t5: Any
    clip_tokenizer: Any
    t5_tokenizer: Any

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Int[batch TEXT_LENGTH] for CLIP and for T5, padded as FluxPipeline pads."""
        options: dict[str, Any] = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True}
        both = [t(texts, return_tensors="pt", **options).input_ids for t in (self.clip_tokenizer, self.t5_tokenizer)]
        return both[0], both[1]

    def encode(self, clip_tokens: Tensor, t5_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP's pooled state, Float[batch width], and T5's states, Float[batch TEXT_LENGTH width]."""
        return self.clip(clip_tokens).pooler_output, self.t5(t5_tokens)[0]


@contextmanager
def blurred(tables: Sequence[nn.Module], generator: Generator) -> Yields[None]:
    """Within the block what these embedding tables give is multiplied by 1 + BLUR times noise."""

    def blur(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        return embedded * (1 + BLUR * torch.randn(embedded.shape, generator=generator))

    hooks = [table.register_forward_hook(blur) for table in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def text_stage(budget: Budget, encoders: Encoders) -> Stage:
    """Trains both encoders with their heads by cross-entropy against the layouts of all training prompts at once."""
    torch.manual_seed(budget.seed + 1)
    width = encoders.t5.config.d_model
    heads = nn.ModuleDict({name: nn.Linear(width, 4 * (KINDS + 1)) for name in ("clip", "t5")})
    known = {s: layouts(split_prompts(s), Generator().manual_seed(7)) for s in ("train", "validation")}
    tokens = {s: encoders.tokens([p.text for p in split_prompts(s)]) for s in ("train", "validation")}

    tables = [encoder.get_input_embeddings() for encoder in (encoders.clip, encoders.t5)]

    def lesson(split: str) -> Tensor:
        pooled, states = encoders.encode(*tokens[split])
        guesses = (heads["clip"](pooled), heads["t5"](states).mean(1))
        return sum((divergence(guess, known[split]) for guess in guesses), torch.zeros(())).mean()

    def loss(step: int, generator: Generator) -> Tensor:
        with blurred(tables, generator):
            return lesson("train")

    def report() -> str:
        return f"divergence from the layouts of validation prompts {float(lesson('validation')):.3f}"

    modules = nn.ModuleDict({"clip": encoders.clip, "t5": encoders.t5, "heads": heads})
    return Stage("text", modules, loss, budget, report, report_every=100)
