"""The parts of a recipe: frozen values, each with its defaults on the embedded world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rollout:
    """How the training images are sampled, and how the gradient is kept."""

    steps: int = 25
    """T, the sampler's steps."""
    batch: int = 32
    """Images an iteration."""
    at_once: int | None = None
    """Images a rollout; the batch is gathered from several if it does not fit. All at once if left out."""
    size: int | None = 32
    """Height and width of the images in pixels; the pipeline's own if left out."""
    frames: int | None = None
    """Frames of a video; left out for images."""
    guidance: float = 3.5
    """The pipeline's guidance_scale."""
    plans: int = 1
    """Plans a rollout; the loss is their mean. Above 1 only methods whose plans end in the rollout's own image."""
    memory: Literal["retain", "recompute", "staged"] = "retain"
    """retain keeps the activations of the plan's model calls; recompute and staged those of one call at a time."""
    checkpointing: bool = False
    """Gradient checkpointing inside the transformer."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the transformer under autocast; weights, latents, decoder and reward stay float32."""


@dataclass(frozen=True)
class Optimiser:
    """AdamW on all parameters of the transformer."""

    rate: float = 3e-5
    """The learning rate, constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the mean gradient and of the mean square."""
    weight_decay: float = 1e-4
    """Decoupled from the gradient."""
    clip: float = 1.0
    """The gradient's norm is clipped to it."""


@dataclass(frozen=True)
class Trained:
    """What of the transformer trains; text encoders and decoder never do."""

    what: Literal["full", "lora"] = "full"
    """full: its own weights. lora: low-rank adapters beside frozen ones, saved for diffusers' load_lora_weights."""
    rank: int = 16
    """Of the adapters."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """The linear layers that get adapters, by the end of their names."""
    pattern: str | None = None
    """With full: a regular expression that is found in the names of the weights that train; all of them if left out."""


@dataclass(frozen=True)
class Hardware:
    """The machine that --dry-run plans for."""

    gpus: int = 1
    """The weights, gradients, moments and averages are sharded over them (FSDP), the batch is divided."""
    memory: float = 80e9
    """Bytes a GPU can use: an 80 GB card has about 85e9, less its context and what fragmentation wastes."""
    flops: float = 989e12
    """Operations a second at its peak: an H100 SXM in bfloat16, dense. An A100 has 312e12."""
    utilisation: float = 0.4
    """The share of the peak that is reached."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out images, drawn with the same noise before and after."""

    images: int = 480
    """How many, spread evenly over the categories of the held-out prompts."""
    steps: int = 25
    """The sampler's steps."""
    batch: int = 48
    """Images at once."""
    pictures: int = 12
    """How many of them are kept for samples.png, which shows the first ones and some whose verdict changed."""
    split: Literal["heldout", "validation"] = "heldout"
    """Which prompts of the embedded world; settings are chosen on validation."""
    metrics: tuple[str, ...] | None = None
    """Further scorers of the images, named as a reward is, that no gradient climbs; else those of the world."""
