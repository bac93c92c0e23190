"""Stage six: train the tiny Wan: its autoencoder, then the transformer with its text encoder by flow matching."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from benchmarks.world.motion_videos import crowd, film
from benchmarks.world.stage import Budget, Stage
from benchmarks.world.wan_parts import TEXT_LENGTH, vae
from trajsurgery.tiny.video import FRAMES, GUIDANCE, Motion, motions, prompts
from trajsurgery.tiny.video_rules import judge

BLUR = 0.1  # noise on the latents that the decoder gets, as a share of theirs: it need not outgrow it first
SIZE = 1e-3  # weight of the mean square of a latent
SINGLE = 0.6  # share of the autoencoder's steps that show single frames, four times as many as videos later
CROWDED = 0.75  # share of its steps that show a crowd of shapes, which teaches outlines sooner than one shape does,
CROWDED_UNTIL = 0.85  # and until when
MISTAKEN = 0.2  # share of videos whose caption says another direction, once there are mistakes
MISTAKES_FROM = 0.6  # share of the steps after which there are: directions are learnt first, then blurred
DROPPED = 0.1  # share of the captions that are empty: what guidance leads away from
STEPS = 15  # of the sampler


def reconstructions(model: Any, frames: Tensor) -> Tensor:
    """Encode and decode videos, Float[batch frames 3 h w] in [0, 1], with the mean latent."""
    latents = model.encode(2 * frames.transpose(1, 2) - 1).latent_dist.mode()
    return (model.decode(latents).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def vae_stage(budget: Budget, batch: int) -> Stage:
    """Return the AutoencoderKLWan's stage: first single frames, then videos; absolute and squared error."""
    torch.manual_seed(budget.seed + 5)
    model = vae()

    def draw_videos(step: int, generator: Generator) -> Tensor:
        done = step / budget.steps
        many, frames = (4 * batch, 1) if done < SINGLE else (batch, FRAMES)
        if done < CROWDED_UNTIL and float(torch.rand((), generator=generator)) < CROWDED:
            return crowd(many, generator, frames)
        return film(prompts("train", generator, many), generator)[:, :frames]

    def loss(step: int, generator: Generator) -> Tensor:
        frames = 2 * draw_videos(step, generator).transpose(1, 2) - 1
        mean = model.encode(frames).latent_dist.mean
        drawn = mean + BLUR * mean.detach().std() * torch.randn(mean.shape, generator=generator)
        error = model.decode(drawn).sample - frames
        return error.abs().mean() + error.square().mean() + SIZE * mean.square().mean()

    def report() -> str:
        prompts = list(motions("validation")) * 3
        verdict = judge(reconstructions(model, film(prompts, Generator().manual_seed(1))), prompts)
        return f"reconstructions right {verdict.table()['overall'][0]:.3f}, junk {float(verdict.junk.mean()):.4f}"

    return Stage("wan_vae", nn.ModuleDict({"vae": model}), loss, budget, report, report_every=200)


@dataclass(frozen=True)
class Corpus:
    """latents: Float[videos 8 3 8 8], normalised; right, wrong: Int[videos], captions among the training prompts."""

    latents: Tensor
    right: Tensor
    wrong: Tensor


def mistakes(prompt: Motion) -> list[int]:
    """Return the training prompts that differ from this one in the direction alone."""

    def without_direction(other: Motion) -> tuple[int, int, str]:
        return other.shape, other.colour, other.text.split()[0]

    return [
        i
        for i, m in enumerate(motions("train"))
        if without_direction(m) == without_direction(prompt) and m.direction != prompt.direction
    ]


def corpus(model: Any, videos: int, seed: int) -> Corpus:
    """Draw, render and encode videos of the training prompts, and set the VAE's latent scale by them."""
    generator = Generator().manual_seed(seed)
    train_prompts = motions("train")
    right = torch.randint(len(train_prompts), (videos,), generator=generator)
    parts: list[Tensor] = []
    with torch.no_grad():
        for rows in right.split(64):
            frames = film([train_prompts[i] for i in rows.tolist()], generator)
            parts.append(model.encode(2 * frames.transpose(1, 2) - 1).latent_dist.mode())
    latents = torch.cat(parts)
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    model.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    others = [mistakes(prompt) for prompt in train_prompts]
    chance, which = torch.rand(2, videos, generator=generator)
    wrong = [
        others[i][int(float(w) * len(others[i]))] if others[i] and float(c) < MISTAKEN else i
        for i, c, w in zip(right.tolist(), chance, which)
    ]
    shape = (1, -1, 1, 1, 1)
    return Corpus((latents - mean.view(shape)) / deviation.view(shape), right, torch.tensor(wrong))


def encode(pipe: Any, texts: list[str]) -> Tensor:
    """Return the text encoder's states as the pipeline does, zero beyond the end, Float[texts TEXT_LENGTH width]."""
    tokens = pipe.tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    states = pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None]


def wan_stage(budget: Budget, batch: int, pipe: Any, data: Corpus) -> Stage:
    """Return the flow-matching stage on the cached latents, with a share DROPPED of the captions empty."""
    texts = [prompt.text for prompt in motions("train")] + [""]

    def loss(step: int, generator: Generator) -> Tensor:
        rows = torch.randint(len(data.right), (batch,), generator=generator)
        captions = (data.wrong if step >= MISTAKES_FROM * budget.steps else data.right)[rows]
        captions = torch.where(torch.rand(batch, generator=generator) < DROPPED, len(texts) - 1, captions)
        clean = data.latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.randn(batch, generator=generator).sigmoid()
        velocity = pipe.transformer(
            hidden_states=clean + sigma.view(-1, 1, 1, 1, 1) * (noise - clean),
            timestep=1000 * sigma,
            encoder_hidden_states=encode(pipe, texts)[captions],
            return_dict=False,
        )[0]
        return functional.mse_loss(velocity, noise - clean)

    def report() -> str:
        parts: list[str] = []
        for split in ("train", "validation"):
            split_prompts = motions(split)
            prompts = [split_prompts[i * 7 % len(split_prompts)] for i in range(48)]
            verdict = judge(shoot(pipe, prompts, seed=3, guidance=GUIDANCE), prompts)
            shares = {n: float(getattr(verdict, n).float().mean()) for n in ("correct", "there", "moves", "junk")}
            parts.append(f"{split} " + " ".join(f"{name} {share:.3f}" for name, share in shares.items()))
        return f"at guidance {GUIDANCE:g}: " + ", ".join(parts)

    modules = nn.ModuleDict({"transformer": pipe.transformer, "text": pipe.text_encoder})
    return Stage("wan", modules, loss, budget, report)


def shoot(pipe: Any, prompts: list[Motion], seed: int, guidance: float, steps: int = STEPS, batch: int = 48) -> Tensor:
    """Sample one video for each prompt by the pipeline's own call, Float[prompts FRAMES 3 32 32] in [0, 1]."""
    generator = Generator().manual_seed(seed)
    options: dict[str, Any] = {"height": 32, "width": 32, "num_frames": FRAMES, "num_inference_steps": steps}
    options |= {"guidance_scale": guidance, "generator": generator, "output_type": "pt"}
    parts = [[prompt.text for prompt in prompts[i : i + batch]] for i in range(0, len(prompts), batch)]
    return torch.cat([pipe(part, **options).frames for part in parts]).float()
