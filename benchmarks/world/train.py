"""Train the shipped weights from seeds; a killed run continues from its checkpoints.

    python -m benchmarks.world.train
    python -m benchmarks.world.train --stage ship

Writes to outputs/tiny; `--stage ship` copies the results into the package. Stages: the autoencoder, then the scorers in
one process beside text encoders, Flux, SD3 and Wan in another. About an hour on 2 cores.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

StageName = Literal["vae", "text", "flux", "scorer", "scorer_b", "scorer_c", "sd3", "wan", "ship", "all"]


@dataclass(frozen=True)
class Training:
    """Stages and their length. The defaults made the shipped weights."""

    stage: StageName = "all"
    """One stage, if those before it are done, or all; "ship" copies the results into the package."""
    output: Path = Path("outputs/tiny")
    """Checkpoints and weights; a second call continues from them."""
    threads: int = 1
    """Threads of torch in each process; all stages together use two processes, which is faster than two threads."""
    seed: int = 0
    vae_steps: int = 1400
    text_steps: int = 700
    flux_steps: int = 7000
    scorer_steps: int = 1500
    sd3_steps: int = 7000
    wan_vae_steps: int = 2500
    wan_steps: int = 12_000
    vae_batch: int = 48
    batch: int = 64
    """Pictures a step of the flux and sd3 stages, two noises for each caption."""
    scenes: int = 48_000
    """Scenes whose latents are cached."""
    videos: int = 16_000
    """Videos whose latents are cached."""
    video_batch: int = 8
    """Videos a step of the Wan's autoencoder; its transformer takes three times as many."""
    save_every: int = 250


INDIFFERENT = ("stage", "output", "threads", "save_every")  # what may differ between runs that make the same weights


def say(line: str) -> None:
    """Print a plain line: progress that reads the same in a log and on a terminal."""
    print(line, flush=True)


def load_vae(folder: Path) -> Any:
    """Load the autoencoder of an earlier stage, frozen."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False).eval()


def train_vae(config: Training) -> None:
    """Train the autoencoder and save it."""
    from benchmarks.world.fit_vae import vae_stage
    from benchmarks.world.stage import Budget, run

    stage = vae_stage(Budget(config.vae_steps, 2e-3, seed=config.seed, save_every=config.save_every), config.vae_batch)
    run(stage, config.output, say)
    model: Any = stage.modules["vae"]
    model.save_pretrained(config.output / "vae")


def new_encoders(folder: Path, seed: int) -> Any:
    """Return untrained text encoders with their tokenizers, which are written to the folder."""
    from benchmarks.world.fit_text import Encoders
    from benchmarks.world.flux_parts import clip_text, t5_text
    from benchmarks.world.tokenizers import clip_tokenizer, t5_tokenizer

    torch.manual_seed(seed + 2)
    clip, t5 = clip_tokenizer(folder / "tokenizer"), t5_tokenizer(folder / "tokenizer_2")
    return Encoders(clip_text(len(clip), clip.eos_token_id), t5_text(len(t5)), clip, t5)


def train_text(config: Training) -> None:
    """Train the text encoders alone and save them."""
    from benchmarks.world.fit_text import text_stage
    from benchmarks.world.stage import Budget, run, save_atomically

    encoders = new_encoders(config.output / "pipeline", config.seed)
    budget = Budget(config.text_steps, 2e-3, weight_decay=0.5, average=0.98, seed=config.seed)
    stage = text_stage(replace(budget, save_every=config.save_every), encoders)
    run(stage, config.output, say)
    save_atomically({"clip": encoders.clip.state_dict(), "t5": encoders.t5.state_dict()}, config.output / "text.pt")


def train_flux(config: Training) -> None:
    """Train the transformer on the text encoders' embeddings and save the whole pipeline."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    from benchmarks.world.fit_flux import corpus, flux_stage
    from benchmarks.world.flux_parts import scheduler, transformer
    from benchmarks.world.stage import Budget, run

    encoders = new_encoders(config.output / "pipeline", config.seed)
    text = torch.load(config.output / "text.pt", weights_only=True)
    encoders.clip.load_state_dict(text["clip"])
    encoders.t5.load_state_dict(text["t5"])
    vae = load_vae(config.output)
    data = corpus(vae, config.scenes, config.seed)
    say(f"flux: {config.scenes} scenes, shift {vae.config.shift_factor:.4f}, scale {vae.config.scaling_factor:.4f}")
    torch.manual_seed(config.seed + 3)
    model = transformer()
    budget = Budget(config.flux_steps, 2e-3, seed=config.seed, save_every=config.save_every)
    run(flux_stage(budget, config.batch, model, encoders, vae, data), config.output, say)
    pipe = FluxPipeline(
        scheduler=scheduler(),
        vae=vae,
        text_encoder=encoders.clip,
        tokenizer=encoders.clip_tokenizer,
        text_encoder_2=encoders.t5,
        tokenizer_2=encoders.t5_tokenizer,
        transformer=model,
    )
    pipe.to(torch.bfloat16).save_pretrained(config.output / "pipeline")


def train_sd3(config: Training) -> None:
    """Train the transformer of a Stable Diffusion 3 on Flux's encoders, and save it."""
    from benchmarks.world.fit_flux import corpus
    from benchmarks.world.fit_sd3 import MISTAKEN, WEIGHTS, sd3_stage
    from benchmarks.world.sd3_parts import save, transformer
    from benchmarks.world.stage import Budget, run
    from trajsurgery.tiny.sd3 import assemble_pipeline

    flux = config.output / "pipeline"
    vae = load_vae(flux)
    data = corpus(vae, config.scenes, config.seed, WEIGHTS, MISTAKEN, scaled=True)
    torch.manual_seed(config.seed + 4)
    pipe = assemble_pipeline(flux, vae, transformer())
    budget = Budget(config.sd3_steps, 2e-3, seed=config.seed, save_every=config.save_every)
    run(sd3_stage(budget, config.batch, pipe, data), config.output, say)
    save(pipe, flux, config.output / "sd3")
    tell_origin(config, "sd3")


def train_wan(config: Training) -> None:
    """Train a Wan on the video world, with its autoencoder, and save the whole pipeline."""
    from benchmarks.world.fit_wan import corpus, vae_stage, wan_stage
    from benchmarks.world.stage import Budget, run
    from benchmarks.world.wan_parts import untrained

    budget = Budget(config.wan_vae_steps, 2e-3, seed=config.seed, save_every=config.save_every)
    first = vae_stage(budget, config.video_batch)
    run(first, config.output, say)
    vae: Any = first.modules["vae"]
    vae.requires_grad_(False)
    data = corpus(vae, config.videos, config.seed)
    torch.manual_seed(config.seed + 6)
    pipe = untrained(config.output / "wan", vae)
    budget = replace(budget, steps=config.wan_steps)
    run(wan_stage(budget, 3 * config.video_batch, pipe, data), config.output, say)
    pipe.to(torch.bfloat16).save_pretrained(config.output / "wan")
    tell_origin(config, "wan")


def train_scorer(config: Training, name: str = "scorer") -> None:
    """Train the reward, or a further scorer, and save it."""
    from benchmarks.world.fit_scorer import save_scorer, scorer_stage
    from benchmarks.world.scorer_variants import VARIANTS
    from benchmarks.world.stage import Budget, run

    budget = Budget(config.scorer_steps, 1.5e-3, weight_decay=0.05, seed=config.seed, save_every=config.save_every)
    stage = scorer_stage(budget, config.output, load_vae(config.output), VARIANTS[name])
    run(stage, config.output, say)
    save_scorer(stage, config.output)


def tell_origin(config: Training, stage: StageName) -> None:
    """Write the stage's origin into its folder: SD3 and Wan may be of another day than the Flux and its scorers."""
    from benchmarks.world.measure import origin

    chosen = {name: value for name, value in vars(config).items() if value != getattr(Training(), name)}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in chosen.items() if name not in INDIFFERENT]
    made = {**origin(), "command": " ".join(["python -m benchmarks.world.train --stage", stage, *flags])}
    (config.output / stage / "made.json").write_text(json.dumps(made, indent=1) + "\n")


def ship(config: Training) -> None:
    """Copy the weights in the output folder into the package, with their origin: never part of "all"."""
    import shutil

    from benchmarks.world.measure import WEIGHTS, origin
    from trajsurgery.tiny.scorer import shipped

    made = {**origin(), "command": f"python -m benchmarks.world.train --seed {config.seed}"}
    for part in ("pipeline", "scorer", *shipped(config.output), "sd3", "wan"):
        if (config.output / part).is_dir():
            shutil.rmtree(WEIGHTS / part, ignore_errors=True)
            shutil.copytree(config.output / part, WEIGHTS / part)
            if part not in ("sd3", "wan"):
                (WEIGHTS / "made.json").write_text(json.dumps(made, indent=1) + "\n")


STAGES: dict[StageName, Callable[[Training], None]] = {
    "vae": train_vae,
    "text": train_text,
    "flux": train_flux,
    "sd3": train_sd3,
    "wan": train_wan,
    "scorer": train_scorer,
    "scorer_b": partial(train_scorer, name="scorer_b"),
    "scorer_c": partial(train_scorer, name="scorer_c"),
    "ship": ship,
}


def run_in_order(config: Training, names: Sequence[StageName]) -> None:
    """Run these stages one after the other."""
    torch.set_num_threads(config.threads)
    for name in names:
        STAGES[name](config)


def main(config: Training) -> None:
    """Run one stage, or all: the autoencoder, then the scorers in a process beside that of the models."""
    if config.stage != "all":
        run_in_order(config, [config.stage])
        return
    run_in_order(config, ["vae"])
    scorers: tuple[StageName, ...] = ("scorer", "scorer_b", "scorer_c")
    beside = get_context("spawn").Process(target=run_in_order, args=(config, scorers), daemon=True)
    beside.start()
    run_in_order(config, ["text", "flux", "sd3", "wan"])
    beside.join()
    if beside.exitcode:
        raise SystemExit("the scorers' training failed, see above; the same command goes on from its checkpoints")


if __name__ == "__main__":
    import tyro

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(tyro.cli(Training, description=__doc__))
