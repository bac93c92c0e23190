"""A run as one frozen value: the method, what it trains, on which reward, for how long. It holds no tensors."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from trajsurgery import methods
from trajsurgery.errors import RecipeError
from trajsurgery.training.settings import (
    Decoder,
    Evaluation,
    Gather,
    Guards,
    Hardware,
    ModelSource,
    Objective,
    Optimiser,
    Rollout,
    Shard,
    Trained,
    WeightsAt,
)

TrackerName = Literal["tensorboard", "wandb", "trackio"]

Method = (
    methods.LeapAlign
    | methods.DRTune
    | methods.ReFL
    | methods.DRaFTLV
    | methods.DRaFT1
    | methods.DRaFTK
    | methods.WholeTrajectory
    | methods.AlignProp
    | methods.FlowBPSparse
    | methods.FlowBPBridge
    | methods.FlowBPLagrange
    | methods.SRPO
)


@dataclass(frozen=True)
class Recipe:
    """Fine-tunes a flow-matching pipeline by a reward's gradient, along the edges that the plan leaves open."""

    preset: Literal["tiny", "paper", "paper-pickscore", "paper-hpsv3", "lora-24gb", "lora-80gb", "full-80gb"] = "tiny"
    """Where defaults come from: tiny is the embedded world on a CPU, paper is FLUX.1-dev with the paper's numbers on 16
    GPUs of 80 GB, paper-REWARD the same with another reward; the others fit the run on one card, with adapters or
    (full) with all weights."""
    method: Annotated[Method, tyro.conf.AvoidSubcommands] = field(default_factory=methods.LeapAlign)
    """Draws a plan for each iteration."""
    model: str = "tiny"
    """tiny (the embedded Flux), tiny:sd3, tiny:wan, a folder that diffusers can load, or a hub id that is cached."""
    model_variant: str | None = None
    """In the names of the model's weight files: fp16 for model.fp16.safetensors. Left out, plain names."""
    transformer: str | None = None
    """Another transformer for the model: one file, as other tools have it (flux1-dev.safetensors), or a folder."""
    reward: str = "tiny"
    """tiny, tiny:SCORER, a name of trajsurgery.rewards.packaged (hpsv2.1, pickscore, imagereward, ...), the same with
    :FILE, remote:HOST:PORT, or MODULE:NAME or FILE.py:NAME: a reward, or what makes one without arguments. A weighted
    sum of such is WEIGHT*REWARD+WEIGHT*REWARD, each on its own scale."""
    prompts: str = "tiny"
    """Training prompts: tiny (categories in the paper's ratio), tiny:even, tiny:wan, or a file: text (one a line),
    CSV, JSONL, JSON, parquet, also as HPDv2, MJHQ-30K and GenEval have them."""
    heldout: str = "tiny"
    """Prompts of the evaluation: tiny, tiny:wan, or a file as for `prompts`, whose categories are kept."""
    objective: Objective = field(default_factory=Objective)
    rollout: Rollout = field(default_factory=Rollout)
    decoder: Decoder = field(default_factory=Decoder)
    train: Trained = field(default_factory=Trained)
    optimiser: Optimiser = field(default_factory=Optimiser)
    ema: float = 0.995
    """Decay of the moving average of the weights, which is what is evaluated and saved."""
    ema_on: Literal["device", "cpu"] = "device"
    """Where the averages are kept, in float32. cpu frees 4 bytes a trained parameter on the device, for a copy an
    iteration."""
    iterations: int = 225
    """Steps of the optimiser. A finished run goes on if there are more of them."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    guards: Guards = field(default_factory=Guards)
    seed: int = 0
    """All draws follow from it."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N. Under torchrun each process has the GPU of its local rank."""
    shard: Shard = "auto"
    """How several processes (torchrun) hold the transformer. fsdp: each has a shard of weights, gradients, moments and
    averages, over the GPUs of a node, with copies across nodes. ddp: each has all of them. auto: ddp for adapters and
    up to a billion trained parameters, else fsdp."""
    gather: Gather = "iteration"
    """When fsdp gathers weights and reduces gradients. iteration: once; each GPU keeps all weights and a gradient of
    all of them until the last backward pass. layer: block by block, in every call, where those do not fit."""
    attention: str = "auto"
    """The attention kernel, by diffusers' names: native, _native_flash, _native_cudnn, flash, _flash_3, ... auto is
    diffusers' own, or the first of torch's kernels whose gradient is finite in a trial before the run."""
    compile_reward: bool = False
    """Compiles the layers of the reward's image tower (torch.compile)."""
    threads: int = 1
    """Threads of torch on the CPU. The embedded Flux gains little from a second one, and loses on a busy machine."""
    save_every: int = 10
    """Iterations between checkpoints: what a killed run has to repeat."""
    keep: int = 2
    """Newest checkpoints that are kept. If the last one is damaged, a run goes on from the one before."""
    output: Path = Path("outputs/leapalign_flux")
    """Where everything is written. A run that was interrupted there goes on."""
    tracker: tuple[TrackerName, ...] = ()
    """Trackers that get scalars, pictures and settings as the run goes, beside metrics.jsonl. They need the extra
    `trackers`."""
    prompt_cache: str = "auto"
    """A folder for encoded prompts, which ranks and later runs share; auto is `prompt-cache` beside the output folder,
    or none for the embedded models, which encode in no time; none leaves them in the host's memory, of each rank."""
    prompt_cache_limit: float = 200.0
    """GiB. As a run starts that has that folder to itself, what no run has used for longest is removed down to this."""
    start: str | None = None
    """A checkpoint (OUTPUT/checkpoints/ITERATION) of another run, whose weights, averages and moments a new run begins
    with: of one that diverged, with a lower rate."""
    overwrite: bool = False
    """Discard what an earlier run left in the output folder."""
    dry_run: bool = False
    """Only say what the run would take in memory and time: no weights, no GPU; writes memory.json."""
    fit: str | None = None
    """With --dry-run, the memory of a card, such as 24GB: prints the cheapest setting that fits, as a command."""
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))  # a text will do
        self._bounds()

    def _bounds(self) -> None:
        """Raises RecipeError for numbers out of their ranges, all at once."""
        counts = {
            "iterations": self.iterations,
            "rollout.steps": self.rollout.steps,
            "rollout.batch": self.rollout.batch,
            "rollout.at_once": self.rollout.at_once,
            "rollout.plans": self.rollout.plans,
            "rollout.size": self.rollout.size,
            "rollout.width": self.rollout.width,
            "rollout.per_prompt": self.rollout.per_prompt,
            "decoder.tiling": self.decoder.tiling,
            "rollout.frames": self.rollout.frames,
            "evaluation.images": self.evaluation.images,
            "evaluation.steps": self.evaluation.steps,
            "evaluation.batch": self.evaluation.batch,
            "evaluation.pictures": self.evaluation.pictures,
            "evaluation.sheet_every": self.evaluation.sheet_every,
            "evaluation.sheet_images": self.evaluation.sheet_images,
            "guards.every": self.guards.every,
            "guards.images": self.guards.images,
            "guards.patience": self.guards.patience,
            "save_every": self.save_every,
            "keep": self.keep,
            "train.rank": self.train.rank,
            "hardware.gpus": self.hardware.gpus,
            "threads": self.threads,
        }
        wrong = [f"{name} = {n}: it is at least 1." for name, n in counts.items() if n is not None and n < 1]
        wrong += [f"{name}: {rule}." for name, (holds, rule) in self._ranges().items() if not holds]
        if wrong:
            raise RecipeError("\n".join(wrong))

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        """Whether each number that is no count lies in its range (NaN lies in none), and what the range is."""
        here, guidance, watch = self.optimiser, self.rollout.guidance, self.guards
        width, shared = self.rollout.width, max(1, self.rollout.per_prompt)
        return {
            f"rollout.width = {width}": (width is None or self.rollout.size is not None, "rollout.size is the height"),
            f"rollout.per_prompt = {shared}": (self.rollout.batch % shared == 0, "it divides rollout.batch"),
            f"prompt_cache_limit = {self.prompt_cache_limit}": (self.prompt_cache_limit >= 0, "it is at least 0 GiB"),
            f"fit = {self.fit}": (self.fit is None or self.dry_run, "it goes with --dry-run"),
            f"ema = {self.ema}": (0 <= self.ema < 1, "a decay lies in [0, 1)"),
            f"rollout.guidance = {guidance}": (math.isfinite(guidance), "it is finite"),
            f"optimiser.warmup = {here.warmup}": (here.warmup >= 0, "it is at least 0"),
            f"optimiser.rate = {here.rate}": (0 < here.rate < math.inf, "it is finite and above 0"),
            f"optimiser.betas = {here.betas}": (all(0 <= b < 1 for b in here.betas), "decays lie in [0, 1)"),
            f"optimiser.weight_decay = {here.weight_decay}": (
                0 <= here.weight_decay < math.inf,
                "it is finite and at least 0",
            ),
            f"hardware = {self.hardware}": (
                all(0 < n < math.inf for n in (self.hardware.memory, self.hardware.flops, self.hardware.utilisation)),
                "its numbers are finite and above 0",
            ),
            f"optimiser.clip = {here.clip}": (here.clip > 0, "it is above 0; inf does not clip"),
            f"guards.anchor = {watch.anchor}": (0 <= watch.anchor < math.inf, "it is finite and at least 0"),
            f"guards.patience = {watch.patience}": (
                watch.patience is None or watch.every is not None,
                "it counts looks, which --guards.every asks for",
            ),
        }

    @property
    def prompt_folder(self) -> Path | None:
        """The folder for encoded prompts; None if they stay in memory."""
        if self.prompt_cache == "auto":
            return None if self.model in EMBEDDED else self.output.parent / "prompt-cache"
        return None if self.prompt_cache == "none" else Path(self.prompt_cache)

    @property
    def source(self) -> ModelSource:
        """Where the model's files are."""
        return ModelSource(self.model, self.model_variant, self.transformer)

    @property
    def weights_at(self) -> WeightsAt:
        """Where similarity is measured: as the objective says, else as the method does."""
        here = self.objective.weights_at
        return here if here is not None else getattr(self.method, "weights_at", "none")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (JSON); the method carries its name."""
        found = asdict(self)
        found["method"] = {"name": type(self.method).__name__, **found["method"]}
        return _plain(found)


EMBEDDED = {"tiny": "tiny", "tiny:sd3": "tiny", "tiny:wan": "tiny:wan"}
"""The models that come with the package, each with the name of its prompts."""

FREE = (
    "output",
    "overwrite",
    "iterations",
    "save_every",
    "keep",
    "device",
    "shard",
    "gather",
    "ema_on",
    "prompt_cache",
    "prompt_cache_limit",
    "evaluation.pictures",
    "evaluation.sheet_every",
    "evaluation.sheet_images",
    "tracker",
    "dry_run",
    "fit",
    "hardware.gpus",
    "hardware.per_node",
    "hardware.memory",
    "hardware.flops",
    "hardware.utilisation",
)
"""What may differ between a run and the one that goes on with it."""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two recipes' dicts differ in, "name: value there, value here", but for what may."""
    defaults = flat_settings(_plain(asdict(Recipe())))  # of what a run of an earlier version knew nothing of
    saved = {name: value for name, value in defaults.items() if not name.startswith("method.")} | flat_settings(there)
    return changed_settings(saved, flat_settings(here), FREE)


def changed_settings(saved: Mapping[str, Any], settings: Mapping[str, Any], free: Container[str] = ()) -> list[str]:
    """Return "name: value there, value here" for each setting that differs, but for the `free` ones."""
    names = [name for name in {**saved, **settings} if name not in free and saved.get(name) != settings.get(name)]
    return [f"{name}: {saved.get(name)} there, {settings.get(name)} here" for name in names]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"rollout.steps": 25, ...} of a nested mapping."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
