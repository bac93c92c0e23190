"""Measure the shipped weights and write the figures beside them.

    python -m benchmarks.world.measure

`measured.json` holds the figures; the weights' `README.md` is a table of them, with commit, command and versions.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

WEIGHTS = Path(__file__).parents[2] / "trajsurgery" / "tiny" / "weights"
MEGABYTE = 1e6


@dataclass(frozen=True)
class Measuring:
    """Which weights to measure, and how many samples."""

    part: Literal["flux", "sd3", "wan"] = "flux"
    """flux with the reward, or sd3 or wan, which have a folder of their own below the weights."""
    weights: Path = WEIGHTS
    each: int = 80
    """Pictures of each of the six categories, or videos of each of the four directions."""
    steps: int = 25
    """Steps of the sampler."""
    threads: int = 1


def median_seconds(action: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median seconds of a call, after one call to warm up."""
    action()
    spent: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return sorted(spent)[repeats // 2]


def seconds(pipe: Any, reward: Any, batch: int = 32) -> dict[str, float]:
    """Return seconds of a transformer call, a decode and the reward at a batch, forward and forward with backward."""
    from benchmarks.world.fit_flux import predict, unpack
    from trajsurgery.tiny.pipe import TEXT_LENGTH, TEXT_WIDTH, TOKENS
    from trajsurgery.tiny.prompt import split_prompts

    noisy, sigma = torch.randn(batch, TOKENS, 16), torch.full((batch,), 0.5)
    pooled, states = torch.randn(batch, TEXT_WIDTH), torch.randn(batch, TEXT_LENGTH, TEXT_WIDTH)
    images, prompts = torch.rand(batch, 3, 32, 32).requires_grad_(), split_prompts("train")[:batch]
    latents = unpack(noisy).requires_grad_()
    calls: dict[str, Callable[[], Any]] = {
        "transformer": lambda: predict(pipe.transformer, noisy, sigma, pooled, states),
        "decode": lambda: pipe.vae.decode(latents).sample,
        "reward": lambda: reward(images, prompts),
    }
    seconds_by_call: dict[str, float] = {"batch": batch}
    for name, call in calls.items():
        with torch.no_grad():
            seconds_by_call[f"{name}_forward"] = median_seconds(call)
        seconds_by_call[f"{name}_forward_backward"] = median_seconds(lambda call=call: call().sum().backward())
    pipe.transformer.zero_grad(set_to_none=True)
    pipe.vae.zero_grad(set_to_none=True)
    return seconds_by_call


def size(folder: Path) -> float:
    """Return the megabytes of all safetensors below the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / MEGABYTE


def measure(config: Measuring) -> dict[str, Any]:
    """Measure the tiny Flux, its autoencoder, the evaluator and the scorers."""
    from benchmarks.world import metrics
    from trajsurgery.tiny.pipe import pipeline
    from trajsurgery.tiny.rules import judge
    from trajsurgery.tiny.scorer import Reward, shipped

    pipe, reward = pipeline(config.weights / "pipeline"), Reward(config.weights / "scorer")
    record: dict[str, Any] = {"steps": config.steps, "threshold": reward.threshold, "megabytes": size(config.weights)}
    record["evaluator"] = metrics.evaluator(2 * config.each)
    record["autoencoder"] = metrics.autoencoder(pipe.vae, 2 * config.each)
    for split in ("train", "validation", "heldout"):
        prompts = metrics.even_prompts(split, config.each)
        images = metrics.draw(pipe, prompts, config.steps, seed=16)
        verdict = judge(images, prompts)
        record[f"base_{split}"] = metrics.score_base(verdict)
        with torch.no_grad():
            scores = reward(images, prompts)
        record[f"ranking_{split}"] = metrics.ranking(scores, verdict)
        record[f"ranking_{split}"]["above_threshold"] = float((scores > reward.threshold).float().mean())
    with torch.no_grad():
        record["against_negatives"] = metrics.against_negatives(reward, 2 * config.each)
    for name in shipped(config.weights):
        scorer = Reward(config.weights / name)
        with torch.no_grad():  # the images are still those of the held-out prompts
            record[f"{name}_ranking_heldout"] = metrics.ranking(scorer(images, prompts), verdict)
            record[f"{name}_against_negatives"] = metrics.against_negatives(scorer, 2 * config.each)
    record["leap_distances"] = metrics.leap_distances(pipe, metrics.even_prompts("train", 10), config.steps, seed=17)
    record["seconds"] = seconds(pipe, reward)
    return record


def origin() -> dict[str, str]:
    """Return versions, machine, date and commit of this run."""
    from importlib.metadata import version

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=WEIGHTS.parent, check=False
    )
    names = ("torch", "diffusers", "transformers", "open_clip_torch")
    return {
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": ", ".join(f"{name} {version(name)}" for name in names) + f", Python {platform.python_version()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
    }


def _rows(figures: dict[str, Any]) -> list[str]:
    def value(x: Any) -> str:
        return f"{x:.4g}" if isinstance(x, float) else str(x)

    rows: list[str] = []
    for part, values in figures.items():
        by_name = values if isinstance(values, dict) else {"": values}
        rows += [f"| {part} | {name} | {value(x)} |" for name, x in by_name.items()]
    return rows


HEADS = {
    "flux": (
        "# The weights of the embedded world",
        "",
        "`pipeline/` is a FluxPipeline, `scorer/` the reward (an open_clip CLIP), `scorer_b/` and `scorer_c/` further",
        "scorers that no gradient climbs; all stored in bfloat16.",
    ),
    "sd3": (
        "# The weights of the tiny Stable Diffusion 3",
        "",
        "The transformer, in bfloat16; the other parts are the tiny Flux's (`../pipeline`). Its text encoders have to",
        "be those that `trained_on.json` names.",
    ),
    "wan": ("# The weights of the tiny Wan", "", "A WanPipeline, stored in bfloat16."),
}


def render_readme(figures: dict[str, Any], made: dict[str, str], measured: dict[str, str], part: str = "flux") -> str:
    """Return the README of the weights."""
    return "\n".join(
        [
            *HEADS[part],
            f"Made on {made['date']} from commit `{made['commit']}` by `{made['command']}`",
            f"({made['versions']}; {made['machine']}).",
            made.get("note", ""),
            "",
            f"Measured on {measured['date']} at commit `{measured['commit']}` by `{measured['command']}`",
            f"({measured['versions']}; {measured['machine']}). Shares unless the name says otherwise; n is the number",
            "of pictures judged, one for each prompt and noise. This file is written by that script.",
            "",
            "| part | figure | value |",
            "|---|---|---|",
            *_rows(figures),
            "",
        ]
    )


def main(config: Measuring) -> None:
    """Measure, and write `measured.json` and `README.md` into the weights' folder."""
    from benchmarks.world import measure_sd3_wan

    torch.set_num_threads(config.threads)
    if config.part == "flux":
        figures, folder = measure(config), config.weights
    else:
        record = (
            measure_sd3_wan.sd3(config.each, config.steps) if config.part == "sd3" else measure_sd3_wan.wan(config.each)
        )
        figures, folder = {**record, "megabytes": size(WEIGHTS / config.part)}, WEIGHTS / config.part
    flags = [
        f"--{name} {getattr(config, name)}"
        for name in ("part", "each")
        if getattr(config, name) != getattr(Measuring, name)
    ]
    measured = {**origin(), "command": " ".join(["python -m benchmarks.world.measure", *flags])}
    made = json.loads((folder / "made.json").read_text())
    (folder / "measured.json").write_text(json.dumps({**figures, "origin": measured}, indent=1) + "\n")
    (folder / "README.md").write_text(render_readme(figures, made, measured, config.part))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    import tyro

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(tyro.cli(Measuring, description=__doc__))
