"""Memory of decoding an image with gradient: plain, checkpointed, and checkpointed in tiles.

    python -m benchmarks.engine.decode

A small AutoencoderKL (random weights, real class) decodes a latent of a 720-pixel image and is differentiated with
respect to it, prepared as a run prepares it for `--decoder`; then a whole iteration of a small Flux pipeline under
`operate(..., memory="recompute")`, with and without these settings. Each figure is the peak resident memory above the
idle process, in a process of its own, the ways in turn, the median of three. Writes decode.json and decode.png to
results/. Minutes on one core; Linux.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from benchmarks.engine.memory import COLOURS, MIB, resident_bytes, run_in_process
from benchmarks.provenance import provenance
from trajsurgery import leapalign, operate
from trajsurgery.training.model import vae_decoding
from trajsurgery.training.settings import Decoder

TILED = Decoder(tiling=256, checkpointing=True)
WAYS = {
    "no gradient": None,
    "gradient": Decoder(),
    "gradient, checkpointing": Decoder(checkpointing=True),
    "gradient, tiling and checkpointing": TILED,
}
ITERATIONS = {"iteration": Decoder(), "iteration, tiling and checkpointing": TILED}


@dataclass(frozen=True)
class Options:
    """Image size and repeats."""

    size: int = 720
    repeats: int = 3
    threads: int = 1
    output: Path = Path(__file__).parent / "results"


def autoencoder() -> Any:
    """Return a frozen autoencoder; the image is 8 times as wide as its latent, as Flux's is."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=8,
        layers_per_block=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.requires_grad_(False).eval()


def pipeline() -> Any:
    """Return a Flux pipeline with that autoencoder."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe: Any = FluxPipeline(FlowMatchEulerDiscreteScheduler(), autoencoder(), None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_decode(size: int, name: str) -> dict[str, Any]:
    """Decode once, and differentiate with respect to the latent unless the way is without gradient."""
    vae, settings = autoencoder(), WAYS[name]
    vae_decoding.prepare_vae(vae, settings or Decoder())
    x = torch.randn(1, 16, size // 8, size // 8).requires_grad_(settings is not None)
    with torch.no_grad():
        vae.decode(x[..., :8, :8])  # the first call pays for what is allocated once
    before = resident_bytes("VmRSS")
    with torch.set_grad_enabled(settings is not None):
        image = vae.decode(x, return_dict=False)[0]
    if settings is not None:
        image.square().sum().backward()
    return {
        "peak_bytes": resident_bytes("VmHWM") - before,
        "gradient_norm": 0.0 if x.grad is None else float(x.grad.norm()),
    }


def measure_iteration(size: int, name: str) -> dict[str, Any]:
    """Roll out with two leaps of gradient, decode, and backpropagate into the transformer."""
    pipe = pipeline()
    vae_decoding.prepare_vae(pipe.vae, ITERATIONS[name])
    inputs = {
        "prompt_embeds": torch.randn(1, 8, 32),
        "pooled_prompt_embeds": torch.randn(1, 32),
        "output_type": "latent",
    }
    with torch.no_grad():
        pipe.vae.decode(torch.randn(1, 16, 8, 8))
    noise = torch.Generator().manual_seed(1)
    before = resident_bytes("VmRSS")
    with operate(pipe, leapalign(4, 2, 0.3), memory="recompute") as surgery:
        pipe(**inputs, height=size, width=size, num_inference_steps=4, generator=noise)
    surgery.decode(surgery.outputs[0]).square().sum().backward()
    gradients = [p.grad for p in pipe.transformer.parameters() if p.grad is not None]
    return {
        "peak_bytes": resident_bytes("VmHWM") - before,
        "gradient_norm": float(torch.nn.utils.get_total_norm(gradients)),
    }


def measure(options: Options) -> dict[str, Any]:
    """Measure all ways, and check that the gradients agree."""
    works = {**dict.fromkeys(WAYS, measure_decode), **dict.fromkeys(ITERATIONS, measure_iteration)}
    rounds = [
        {name: run_in_process(work, options.size, name) for name, work in works.items()} for _ in range(options.repeats)
    ]
    plain, checkpointed = (rounds[0][name]["gradient_norm"] for name in ("gradient", "gradient, checkpointing"))
    assert abs(plain - checkpointed) <= 1e-4 * plain, f"these are different gradients: {plain}, {checkpointed}"
    peaks = {name: [result[name]["peak_bytes"] for result in rounds] for name in works}
    medians = {name: median(values) for name, values in peaks.items()}
    ratios = {name: round(medians[name] / medians["no gradient"], 3) for name in WAYS}
    return {"peak_bytes": peaks, "median_bytes": medians, "to_no_gradient": ratios}


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw a bar for each way, its peak beside it, and a line at twice the decode without gradient."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    values = {name: value / MIB for name, value in record["median_bytes"].items()}
    colours = [COLOURS[1] if name in WAYS else COLOURS[2] for name in values]
    axes.barh(list(values), list(values.values()), color=colours, height=0.6)
    for place, value in enumerate(values.values()):
        axes.text(value, place, f" {value:.0f}", va="center")
    twice = 2 * values["no gradient"]
    axes.axvline(twice, color="0.4", linestyle="--", linewidth=1, label="twice the decode without gradient")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="MiB", title=f"peak resident memory above the idle process, {record['settings']['size']} px")
    figure.legend(frameon=False, loc="outside lower center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(options: Options) -> int:
    """Measure, write, and return 1 if tiles and checkpointing take more than twice the decode without gradient."""
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in asdict(options).items() if name != "output"}
    record = {**provenance(), "settings": settings, **measure(options)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "decode.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, options.output / "decode.png")
    ratio = record["to_no_gradient"]["gradient, tiling and checkpointing"]
    print(f"tiling and checkpointing: {ratio} times the decode without gradient")
    return 0 if ratio <= 2 else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
