"""Stage five: train a tiny Stable Diffusion 3 for classifier-free guidance, on the frozen encoders of the tiny Flux."""

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from benchmarks.world.fit_flux import (
    DRAWS,
    LESSON,
    MISTAKES_FROM,
    Corpus,
    draw_sigmas,
    quadrants,
    record_states,
    unpack,
)
from benchmarks.world.layout import KINDS
from benchmarks.world.stage import Budget, Stage
from trajsurgery.tiny.prompt import split_prompts
from trajsurgery.tiny.sd3 import GUIDANCE

# As for Flux but for more single objects, and more mistakes: guidance makes up for some of them.
WEIGHTS = {
    "single object": 0.16,
    "two objects": 0.14,
    "counting": 0.18,
    "colours": 0.1,
    "position": 0.22,
    "attribute binding": 0.2,
}
MISTAKEN = {"position": 0.5, "attribute binding": 0.55}
DROPPED = 0.1  # share of the captions that are empty: what guidance leads away from


@torch.no_grad()
def encoded(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the pipeline's own token states, Float[texts 24 width], and pooled states, Float[texts 2*width]."""
    embeddings = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
    return embeddings[0], embeddings[2]


def sd3_stage(budget: Budget, batch: int, pipe: Any, data: Corpus) -> Stage:
    """Return the stage: flow matching, head and mistaken captions as for Flux; a share DROPPED is empty."""
    states, pooled = encoded(pipe, [prompt.text for prompt in split_prompts("train")] + [""])
    empty = len(states) - 1
    latents = unpack(data.tokens)
    torch.manual_seed(budget.seed + 7)
    head = nn.Linear(pipe.transformer.inner_dim, KINDS + 1)

    def loss(step: int, generator: Generator) -> Tensor:
        rows = torch.randint(len(data.right), (batch // DRAWS,), generator=generator)
        captions = (data.wrong if step >= MISTAKES_FROM * budget.steps else data.right)[rows]
        captions = captions.repeat_interleave(DRAWS)
        captions = torch.where(torch.rand(batch, generator=generator) < DROPPED, empty, captions)
        clean, shown = (part[rows].repeat_interleave(DRAWS, 0) for part in (latents, data.shown))
        noise, sigma = torch.randn(clean.shape, generator=generator), draw_sigmas(batch, generator)
        with record_states(pipe.transformer.transformer_blocks[1]) as hidden:
            velocity = pipe.transformer(
                hidden_states=clean + sigma[:, None, None, None] * (noise - clean),
                timestep=1000 * sigma,
                encoder_hidden_states=states[captions],
                pooled_projections=pooled[captions],
                return_dict=False,
            )[0]
        predicted_contents = head(quadrants(hidden[0]))
        flow_loss = functional.mse_loss(velocity, noise - clean)
        return flow_loss + LESSON * functional.cross_entropy(predicted_contents.flatten(0, 1), shown.flatten())

    def report() -> str:
        from benchmarks.world.metrics import draw
        from trajsurgery.tiny.rules import judge

        prompts = [p for p in split_prompts("validation") for _ in range(4 if p.category != "position" else 2)]
        verdict = judge(draw(pipe, prompts, 25, seed=3, guidance_scale=GUIDANCE), prompts)
        table = " ".join(f"{category} {share:.2f}" for category, (share, _) in verdict.table().items())
        return f"right at guidance {GUIDANCE:g}: {table}, junk {float(verdict.junk.mean()):.4f}"

    return Stage("sd3", nn.ModuleDict({"transformer": pipe.transformer, "head": head}), loss, budget, report)
