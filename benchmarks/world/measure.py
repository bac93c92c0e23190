"""`python -m benchmarks.world.measure`: measures the shipped weights and writes what it found beside them.

`measured.json` holds the figures; `README.md` tells them, with the commit, the command and the versions behind them.
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
    """How much to measure, and where the weights are."""

    part: Literal["flux", "sd3", "wan"] = "flux"
    """flux with the reward, or one of the others, which have a folder of their own below the weights."""
    weights: Path = WEIGHTS
    each: int = 80
    """Pictures of each of the six categories, or videos of each of the four directions."""
    steps: int = 25
    """Steps of the sampler."""
    threads: int = 1


def median_seconds(action: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, after one to warm up."""
    action()
    spent: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return sorted(spent)[repeats // 2]


def seconds(pipe: Any, reward: Any, batch: int = 32) -> dict[str, float]:
    """Seconds of one transformer call, decode and reward at a batch, forward and forward with backward."""
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
    found: dict[str, float] = {"batch": batch}
    for name, call in calls.items():
        with torch.no_grad():
            found[f"{name}_forward"] = median_seconds(call)
        found[f"{name}_forward_backward"] = median_seconds(lambda call=call: call().sum().backward())
    pipe.transformer.zero_grad(set_to_none=True)
    pipe.vae.zero_grad(set_to_none=True)
    return found


def size(folder: Path) -> float:
    """Megabytes of all safetensors below the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / MEGABYTE


def measure(config: Measuring) -> dict[str, Any]:
    """All figures, by name of their part."""
    from benchmarks.world import metrics
    from trajsurgery.tiny.pipe import pipeline
    from trajsurgery.tiny.rules import judge
    from trajsurgery.tiny.scorer import Reward, shipped

    pipe, reward = pipeline(config.weights / "pipeline"), Reward(config.weights / "scorer")
    found: dict[str, Any] = {"steps": config.steps, "threshold": reward.threshold, "megabytes": size(config.weights)}
    found["evaluator"] = metrics.evaluator(2 * config.each)
    found["autoencoder"] = metrics.autoencoder(pipe.vae, 2 * config.each)
    for split in ("train", "validation", "heldout"):
        prompts = metrics.even_prompts(split, config.each)
        images = metrics.draw(pipe, prompts, config.steps, seed=16)
        verdict = judge(images, prompts)
        found[f"base_{split}"] = metrics.score_base(verdict)
        with torch.no_grad():
            scores = reward(images, prompts)
        found[f"ranking_{split}"] = metrics.ranking(scores, verdict)
        found[f"ranking_{split}"]["above_threshold"] = float((scores > reward.threshold).float().mean())
    with torch.no_grad():
        found["against_negatives"] = metrics.against_negatives(reward, 2 * config.each)
    for name in shipped(config.weights):
        scorer = Reward(config.weights / name)
        with torch.no_grad():  # the images are still those of the held-out prompts
            found[f"{name}_ranking_heldout"] = metrics.ranking(scorer(images, prompts), verdict)
            found[f"{name}_against_negatives"] = metrics.against_negatives(scorer, 2 * config.each)
    found["leap_distances"] = metrics.leap_distances(pipe, metrics.even_prompts("train", 10), config.steps, seed=17)
    found["seconds"] = seconds(pipe, reward)
    return found


def origin() -> dict[str, str]:
    """Versions, machine, date and commit of this run."""
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
    for part, found in figures.items():
        flat = found if isinstance(found, dict) else {"": found}
        rows += [f"| {part} | {name} | {value(x)} |" for name, x in flat.items()]
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
    """The README of the weights."""
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
    """Measures and writes `measured.json` and `README.md` into the weights' folder."""
    from benchmarks.world import measure_sd3_wan

    torch.set_num_threads(config.threads)
    if config.part == "flux":
        figures, folder = measure(config), config.weights
    else:
        found = (
            measure_sd3_wan.sd3(config.each, config.steps) if config.part == "sd3" else measure_sd3_wan.wan(config.each)
        )
        figures, folder = {**found, "megabytes": size(WEIGHTS / config.part)}, WEIGHTS / config.part
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
