"""The parts of a recipe: frozen values, each with its defaults on the embedded world."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from trajsurgery.errors import RecipeError

Gather = Literal["iteration", "layer"]
Shard = Literal["auto", "fsdp", "ddp", "none"]

WeightsAt = Literal["all", "none", "j"] | tuple[int, ...]
"""Where similarity is measured (Fig. 4d): at all landings, nowhere, at all but the last (d_j), or at given times."""


@dataclass(frozen=True)
class ModelSource:
    """Where a pipeline's files are."""

    name: str
    """An embedded model, a folder that `save_pretrained` wrote, or a hub id in the local cache."""
    variant: str | None = None
    """In the names of its weight files, such as fp16 in model.fp16.safetensors. Parts without it have plain names."""
    transformer: str | None = None
    """Another transformer for it: a file in any layout that diffusers' `from_single_file` reads, or a folder."""

    def __post_init__(self) -> None:
        if self.name.partition(":")[0] == "tiny" and (self.variant or self.transformer):
            raise RecipeError(
                f"{self.name} is embedded: --model-variant and --transformer need a folder or hub id as --model."
            )


@dataclass(frozen=True)
class Objective:
    """Settings of the loss."""

    threshold: float | None = None
    """lambda of the hinge, on the reward's own scale; by default the reward's `threshold`."""
    tau: float = 0.1
    """Lower bound of a leap's distance, a length in latent space; set it from measured distances."""
    weights_at: WeightsAt | None = None
    """Where similarity is measured: "all" landings, "none", "j" (all but 0), or times such as 0; by default where
    the method measures it.
    """

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise RecipeError(
                f"objective.tau = {self.tau}: it bounds a distance from below, so it is finite and above 0."
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise RecipeError(f"objective.threshold = {self.threshold}: a hinge that is to close needs a finite one.")


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
    width: int | None = None
    """Their width where it is not their height, which is `size` then."""
    per_prompt: int = 1
    """Images a prompt, each with its own noise; it divides the batch."""
    frames: int | None = None
    """Frames of a video; left out for images."""
    guidance: float = 3.5
    """The pipeline's guidance_scale."""
    plans: Annotated[int, tyro.conf.arg(aliases=("--rollout.plans-per-rollout",))] = 1
    """Plans a rollout; the loss is their mean. Above 1 only methods whose plans end in the rollout's own image."""
    times: Literal["shared", "per-sample"] = "shared"
    """shared: one draw of the method for a rollout. per-sample: one for each image; the plans' model calls are then
    made anew after the rollout, whatever `memory` is: retain keeps their activations, and saves no call."""
    memory: Literal["split", "retain", "recompute", "staged"] = "split"
    """split keeps the activations of the plan's model calls, and holds no second gradient of the weights; retain holds
    one; recompute and staged keep the activations of one call at a time, and make each call with gradient once more."""
    checkpointing: bool = False
    """Gradient checkpointing inside the transformer."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the transformer computes in: float32 weights under autocast, or as --train.weights and --train.base say."""
    compile: bool = False
    """Compiles the transformer's repeated blocks (torch.compile). On an H100 an iteration of FLUX.1-dev (staged,
    without checkpointing) then takes 2.5 s instead of 3.3, after half a minute of compiling. Images and gradients
    differ from eager ones by rounding."""
    compile_trial: bool = True
    """Where `compile` is off, on a GPU with an unsharded transformer, and where the run is long enough for it to pay:
    compiles the blocks before the run, measures model calls with and without, and keeps what is faster."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width in pixels, if they are not left to the pipeline."""
        return None if self.size is None else (self.size, self.width or self.size)


@dataclass(frozen=True)
class Decoder:
    """How the VAE, which is frozen, makes images of latents, with gradient."""

    tiling: int | None = None
    """The side in pixels of overlapping tiles that are decoded one by one; whole images if left out, whose pixels
    differ a little."""
    slicing: bool = False
    """Decodes the images of a batch one by one."""
    checkpointing: bool = False
    """Keeps the latents of each image or tile, and computes the rest again in the backward pass."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 if that is --rollout.precision and the VAE's config says force_upcast = false, else float32."""
    compile: bool = False
    """Compiles the decoder (torch.compile)."""
    stay: bool = False
    """Keeps the VAE on the device; it else waits on the CPU, and is there from its decoding to its backward pass."""


@dataclass(frozen=True)
class Optimiser:
    """What steps the parameters that train."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """adamw; adamw8bit (torchao), whose moments take a quarter of the memory; adafactor, whose moments take none."""
    rate: float = 3e-5
    """The learning rate, constant after the warm-up."""
    warmup: int = 0
    """Iterations over which the rate rises linearly."""
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
    weights: Literal["float32", "bfloat16"] = "float32"
    """What the weights that train are kept in, with full. bfloat16 (with --optimiser.name adamw8bit) takes half the
    memory, and the model computes in it without autocast."""
    base: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    """What the frozen weights beside adapters are kept in: auto is --rollout.precision; int8 (torchao) and nf4
    (bitsandbytes) are quantised as the model is loaded."""
    keep_encoders: bool = False
    """Keeps the text encoders in memory; they are else let go once the run's prompts are encoded."""


@dataclass(frozen=True)
class Hardware:
    """The machine that --dry-run plans for."""

    gpus: int = 1
    """How many, which divide the batch and hold the transformer as --shard says."""
    per_node: int = 8
    """How many of them share a machine, over which fsdp shards; each machine holds a copy (HSDP)."""
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
    sheet_every: int | None = 50
    """Iterations between contact sheets: pictures of the same held-out prompts by the averaged weights, in sheets/."""
    sheet_images: int = 8
    """How many pictures a sheet has."""


@dataclass(frozen=True)
class Guards:
    """What keeps a reward from being climbed at the price of what it stands for. All are off by default."""

    every: int | None = None
    """Iterations between looks: images of validation prompts by the averaged weights, graded by the reward and by
    evaluation.metrics, which no gradient climbs. The first look is at the untuned model. No looks if left out."""
    prompts: str | None = None
    """Validation prompts, a file as for --prompts. The embedded world has its own."""
    images: int = 48
    """How many a look, spread evenly over the categories, always with the same noise."""
    by: str | None = None
    """The scorer whose fall stops the run, one of evaluation.metrics; the first of them if left out."""
    patience: int | None = None
    """So many looks in a row without a new best stop the run, and the averaged weights of the best look are what is
    evaluated and saved. Left out, a run is never stopped and its last weights are kept."""
    anchor: float = 0.0
    """c in c * mean (v - v_base)^2, which is added to the loss at a recorded x_t of a drawn t: what trains is held to
    the untuned model's velocities. It costs two model calls a rollout, and a copy of what trains on the CPU."""
