"""Stage five: a tiny Stable Diffusion 3 with real classifier-free guidance, on the frozen encoders of the tiny Flux."""

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from trajsurgery.tiny.architecture import LATENT_CHANNELS, LATENT_SIDE, TEXT_WIDTH, WIDTH, scheduler
from trajsurgery.tiny.fit_flux import DRAWS, MISTAKES_FROM, Corpus, unpack
from trajsurgery.tiny.pipe import shortened
from trajsurgery.tiny.prompt import split_prompts
from trajsurgery.tiny.stage import Budget, Stage

GUIDANCE = 1.5  # of the pipeline's calls, chosen on validation prompts: 1 to 3.5 were tried
DROPPED = 0.1  # share of the captions that are empty: what guidance leads away from


def transformer() -> Any:
    """An SD3Transformer2DModel of about a million parameters whose output and modulation start at zero."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIDE // 2,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        modulates = isinstance(module, nn.Linear) and name.endswith(".linear") and "norm" in name
        if modulates or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def projected(folder: Path) -> Any:
    """The tiny Flux's CLIP as SD3 wants it: a CLIPTextModelWithProjection, whose projection is the identity."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    trained: Any = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    trained.config.projection_dim = TEXT_WIDTH
    model: Any = CLIPTextModelWithProjection(trained.config)
    weights = {f"text_model.{name.removeprefix('text_model.')}": p for name, p in trained.state_dict().items()}
    model.load_state_dict({**weights, "text_projection.weight": torch.eye(TEXT_WIDTH)})
    return model


def untrained(flux: Path, vae: Any) -> Any:
    """A StableDiffusion3Pipeline whose transformer is new; all else is the tiny Flux's of the folder, frozen.

    Both its CLIPs are Flux's. The pipeline pads their joined states to the width of T5's, which is that of one CLIP
    here: it cuts the second off, of which the pooled state alone is used.
    """
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

    clip = CLIPTokenizer.from_pretrained(flux / "tokenizer")
    pipe: Any = StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=scheduler(),
        vae=vae,
        text_encoder=projected(flux / "text_encoder"),
        tokenizer=clip,
        text_encoder_2=projected(flux / "text_encoder"),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel.from_pretrained(flux / "text_encoder_2", dtype=torch.float32),
        tokenizer_3=T5Tokenizer.from_pretrained(flux / "tokenizer_2"),
    )
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipe, name).requires_grad_(False).eval()
    return shortened(pipe)


@torch.no_grad()
def encoded(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The pipe's own token states, Float[texts 24 width], and pooled states, Float[texts 2*width]."""
    found = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
    return found[0], found[2]


def sd3_stage(budget: Budget, batch: int, pipe: Any, data: Corpus) -> Stage:
    """Flow matching as for Flux, its mistaken captions too, with DROPPED of the captions replaced by the empty one."""
    states, pooled = encoded(pipe, [prompt.text for prompt in split_prompts("train")] + [""])
    empty = len(states) - 1
    latents = unpack(data.tokens)

    def loss(step: int, generator: Generator) -> Tensor:
        rows = torch.randint(len(data.right), (batch // DRAWS,), generator=generator)
        captions = (data.wrong if step >= MISTAKES_FROM * budget.steps else data.right)[rows]
        captions = captions.repeat_interleave(DRAWS)
        captions = torch.where(torch.rand(batch, generator=generator) < DROPPED, empty, captions)
        clean = latents[rows].repeat_interleave(DRAWS, 0)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.randn(batch, generator=generator).sigmoid()
        velocity = pipe.transformer(
            hidden_states=clean + sigma[:, None, None, None] * (noise - clean),
            timestep=1000 * sigma,
            encoder_hidden_states=states[captions],
            pooled_projections=pooled[captions],
            return_dict=False,
        )[0]
        return functional.mse_loss(velocity, noise - clean)

    def report() -> str:
        from trajsurgery.tiny.figures import draw
        from trajsurgery.tiny.rules import judge

        prompts = [p for p in split_prompts("validation") for _ in range(4 if p.category != "position" else 2)]
        verdict = judge(draw(pipe, prompts, 25, seed=3, guidance_scale=GUIDANCE), prompts)
        table = " ".join(f"{category} {share:.2f}" for category, (share, _) in verdict.table().items())
        return f"right at guidance {GUIDANCE:g}: {table}, junk {float(verdict.junk.mean()):.4f}"

    return Stage("sd3", nn.ModuleDict({"transformer": pipe.transformer}), loss, budget, report)
