"""Memory of full backpropagation against the number of steps, in five ways of running it.

    python -m benchmarks.engine.memory

A Flux transformer (18 M parameters, random weights) samples in n steps and is differentiated through all of them, each
point in a process of its own: bytes that autograd saves for the backward pass (storage by storage, parameters left
out), peak resident memory above the model and `.grad`, processor time of the whole iteration. Then, for the backward
pass of two calls, the bytes of weight gradients alive at once beside `.grad`: one graph through both against the staged
sweep. Writes memory.json and memory.png to results/. Minutes on one core; Linux.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.provenance import provenance
from trajsurgery import Plan, apply, backward, latent, leapalign, rollout, sample

WAYS = {
    "retain": ("retain", False),
    "recompute": ("recompute", False),
    "retain + checkpointing": ("retain", True),
    "recompute + checkpointing": ("recompute", True),
    "staged": ("staged", False),
}
"""Name: `memory=` or the staged sweep, and whether the transformer's own gradient checkpointing is on."""

COLOURS = ("#b3442e", "#0b6e99", "#e0a458", "#5aa9c7", "#2e7d32")
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """Numbers of steps, and the size of the latent."""

    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 25)
    """Numbers of steps, one leap each."""
    side: int = 15
    """The latent is side x side tokens."""
    batch: int = 1
    threads: int = 1
    output: Path = Path(__file__).parent / "results"


class Field(nn.Module):
    """A Flux transformer as a velocity field on packed latents [batch, tokens, 16]."""

    def __init__(self, side: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=64,
            num_attention_heads=6,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            guidance_embeds=False,
            axes_dims_rope=(8, 28, 28),
        )
        self.text, self.pooled = torch.randn(1, 32, 128), torch.randn(1, 128)
        self.places = torch.tensor([[0.0, i, j] for i in range(side) for j in range(side)])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity, called as FluxPipeline calls the transformer."""
        return self.model(
            hidden_states=x,
            encoder_hidden_states=self.text.expand(len(x), -1, -1),
            pooled_projections=self.pooled.expand(len(x), -1),
            timestep=sigma.expand(len(x)),
            img_ids=self.places,
            txt_ids=torch.zeros(32, 3),
            return_dict=False,
        )[0]


def full_backpropagation(steps: int) -> Plan:
    """Return the plan whose gradient passes through every step of the sampler."""
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.leap(t - 1)
    return Plan(x)


def count_saved_bytes(run: Callable[[], Any], parameters: list[nn.Parameter]) -> tuple[int, Any]:
    """Return the bytes that autograd saves in `run` and still holds at its end, and the result of `run`."""
    parameter_storages = {p.untyped_storage()._cdata for p in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameter_storages and storage._cdata not in saved:
            saved[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, saved.pop, storage._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return sum(saved.values()), output


def resident_bytes(what: str) -> int:
    """Return this process's resident memory: VmRSS now, VmHWM at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def measure_point(options: Options, way: str, steps: int) -> dict[str, Any]:
    """Measure one point: run the iteration, then only its forward pass with saved tensors counted."""
    memory, checkpointing = WAYS[way]
    field = Field(options.side)
    if checkpointing:
        field.model.enable_gradient_checkpointing()
    noise = torch.randn(options.batch, options.side**2, 16, generator=torch.Generator().manual_seed(1))
    sigmas, parameters = torch.linspace(1, 0, steps + 1), list(field.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)

    def forward() -> Any:
        if memory == "staged":
            return rollout(field, noise, sigmas)
        return sample(full_backpropagation(steps), field, noise, sigmas, memory=memory)[0]

    def iteration() -> None:
        output = forward()
        if memory == "staged":
            backward(full_backpropagation(steps), output, field, output[0] * (2 / output[0].numel()))
        else:
            output.square().mean().backward()

    with torch.no_grad():
        field(noise, sigmas[0])  # the first call pays for what is allocated once
    before, began, work = resident_bytes("VmRSS"), time.perf_counter(), time.process_time()
    iteration()
    seconds, worked, peak = time.perf_counter() - began, time.process_time() - work, resident_bytes("VmHWM")
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    return {
        "steps": steps,
        "kept_bytes": count_saved_bytes(forward, parameters)[0],
        "peak_bytes": peak - before,
        "seconds": seconds,
        "processor_seconds": worked,
        "gradient_norm": norm,
    }


class PeakWeightGradients(TorchDispatchMode):
    """Record the most bytes of weight-shaped tensors alive at once, of those created under this mode."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.shapes = {tuple(p.shape) for p in parameters} | {tuple(p.t().shape) for p in parameters}
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        input_storages = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        for value in tree_leaves(outputs):
            if isinstance(value, Tensor) and tuple(value.shape) in self.shapes:
                storage = value.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in input_storages:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return outputs


def measure_weight_gradients(options: Options) -> dict[str, Any]:
    """Return the bytes of weight gradients alive at once beside `.grad`, in the backward of LeapAlign's two calls."""
    field = Field(options.side)
    noise = torch.randn(options.batch, options.side**2, 16, generator=torch.Generator().manual_seed(1))
    plan, trajectory = leapalign(3, 1, 0.3), rollout(field, noise, torch.linspace(1, 0, 5))
    weights = [p for p in field.parameters() if p.dim() == 2]
    for p in field.parameters():
        p.grad = torch.zeros_like(p)
    peaks: dict[str, Any] = {
        "parameters": sum(p.numel() for p in field.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in weights),
    }
    reference: list[Tensor] = []
    for way in ("retain", "recompute", "staged"):
        field.zero_grad(set_to_none=False)
        gradients = PeakWeightGradients(weights)
        if way == "staged":
            ones = torch.ones_like(noise)
            with gradients:
                backward(plan, trajectory, field, ones)
        else:
            with gradients:
                out = apply(plan, trajectory, field, way).sum()
            assert gradients.most == 0, "an activation has the shape of a weight: choose another --side"
            with gradients:
                out.backward()
        weight_gradients = [p.grad.clone() for p in weights]
        reference = reference or weight_gradients
        difference = torch.stack([(a - b).norm() for a, b in zip(weight_gradients, reference)]).norm()
        assert difference <= 1e-4 * torch.stack([g.norm() for g in reference]).norm(), (
            "this compares different gradients"
        )
        peaks[way] = gradients.most
    return peaks


def run_in_process(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Return `work(*args)` from a new process, forked before torch has computed anything: its peak is its own."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=lambda: results.put(work(*args)))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{work.__name__}{args[1:]} ended with code {process.exitcode}")
    result = results.get()
    print(work.__name__, *args[1:], {name: round(value, 3) for name, value in result.items()}, flush=True)
    return result


def measure(options: Options) -> dict[str, Any]:
    """Measure all points, and check that the gradients of all ways agree."""
    weight_gradients = run_in_process(measure_weight_gradients, options)
    points = {way: [run_in_process(measure_point, options, way, count) for count in options.counts] for way in WAYS}
    for i in range(len(options.counts)):
        norms = [results[i]["gradient_norm"] for results in points.values()]
        assert max(norms) - min(norms) <= 1e-4 * max(norms), f"these are different gradients: {norms}"
    return {"points": points, "gradients_beside_grad": weight_gradients}


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw saved bytes, peak and time against the number of steps, and the bytes of weight gradients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (saved_axes, peak_axes), (time_axes, gradient_axes) = figure.subplots(2, 2)
    panels = {
        "kept_bytes": (saved_axes, MIB, "MiB", "kept by autograd for the backward pass"),
        "peak_bytes": (peak_axes, MIB, "MiB", "peak resident memory above the idle model's"),
        "processor_seconds": (time_axes, 1, "s", "processor time of an iteration, its sampling included"),
    }
    for name, (axes, unit, label, title) in panels.items():
        for colour, (way, points) in zip(COLOURS, record["points"].items()):
            counts, values = [p["steps"] for p in points], [p[name] / unit for p in points]
            axes.plot(counts, values, "o-", color=colour, label=way, markersize=4, alpha=0.8)
        axes.set(xlabel="steps backpropagated through", ylabel=label, title=title, xticks=counts)
        if name == "kept_bytes":
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_ylim(bottom=-0.004)
        else:
            axes.set_ylim(bottom=0)
    time_axes.legend(frameon=False, fontsize=8, loc="upper left")
    bars = {"retain": "retain", "recompute": "recompute", "staged": "staged sweep\n(trajsurgery.backward)"}
    gradients = record["gradients_beside_grad"]
    for place, (name, colour) in enumerate(zip(bars, (COLOURS[0], COLOURS[1], COLOURS[4]))):
        ratio = gradients[name] / gradients["weight_bytes"]
        gradient_axes.bar(place, ratio, color=colour, width=0.6)
        gradient_axes.text(place, ratio, f"{ratio:.2f}", ha="center", va="bottom")
    gradient_axes.set_xticks(range(len(bars)), bars.values())
    gradient_axes.set(
        ylabel="parameter gradients", title="weight gradients alive at once beside .grad,\nbackward of two calls"
    )
    for axes in (saved_axes, peak_axes, time_axes, gradient_axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(options: Options) -> int:
    """Measure, write, and return 1 if recomputing all steps saves more than retaining one step."""
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in asdict(options).items() if name != "output"}
    record = {**provenance(), "settings": settings, **measure(options)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, options.output / "memory.png")
    one, last = record["points"]["retain"][0]["kept_bytes"], record["points"]["recompute"][-1]["kept_bytes"]
    print(f"{options.counts[-1]} recomputed steps keep {last} bytes, one retained step {one}")
    return 0 if last <= one else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
