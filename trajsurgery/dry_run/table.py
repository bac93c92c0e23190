"""A memory plan as a table on the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from trajsurgery.dry_run.memory_plan import MemoryPlan

LABELS = {
    "ema": "EMA",
    "gathered blocks": "blocks that FSDP gathers",
    "kept for the calls": "activations kept for the calls",
    "unreduced gradients": "gradients that each GPU adds up whole",
    "second gradient": "second gradient, in autograd's buffers",
}
"""What parts are called on the terminal, where more is to be said than in JSON."""
SHARES = {
    "none": "",
    "ddp": ", each with all weights, and its share of the batch",
    "fsdp": ", weights, gradients, moments and EMA sharded by FSDP within a machine",
}
KERNELS = {
    "cuda": "attention as flash attention keeps it, fused RMSNorm",
    "cpu": "attention as flash attention keeps it, other kernels as a CPU's",
}


def table(plan: MemoryPlan) -> Group:
    """Return the settings, bytes a GPU, operations and seconds of an iteration, the fewest GPUs, and notes."""
    setting = plan.setting
    gpus = setting["gpus"]
    head = Table(title=f"{setting['method']} on {plan.model}", show_header=False, box=None)
    rows = {
        "plan": plan.plan,
        "images": f"{setting['size']} px, batch {setting['batch']}, {setting['images at once a GPU']} at once on each",
        "text": f"{setting['text tokens']} tokens",
        "GPUs": f"{gpus} of {setting['memory bytes'] / 1e9:.0f} GB" + SHARES[setting["shard"]],
        "kernels": KERNELS[setting["kernels"]],
        "precision": f"{setting['precision']}, checkpointing {'on' if setting['checkpointing'] else 'off'}",
        "trains": f"{setting['train']}: {plan.trained:,} of {plan.parameters:,} parameters, by {setting['optimiser']}",
        "weights": setting["weights"],
        "gradient": f"{setting['memory']}, {plan.calls} velocity calls of {setting['steps']} steps",
        "configs": plan.source,
    }
    for name, value in rows.items():
        head.add_row(name, Text(value))
    size = Table(title="memory of one GPU")
    size.add_column("part")
    word, bytes_ = ("GiB", 2**30) if plan.peak >= 2**30 else ("MiB", 2**20)
    size.add_column(word, justify="right")
    for name, value in (*plan.held.items(), *plan.passing.items()):
        size.add_row(
            LABELS.get(name, name),
            f"{value / bytes_:,.2f}",
            end_section=name in (list(plan.held)[-1], list(plan.passing)[-1]),
        )
    size.add_row("peak", f"{plan.peak / bytes_:,.2f}", style="bold")
    work = Table(title="work of one iteration, all GPUs")
    work.add_column("part")
    whole = sum(plan.flops.values())
    unit, scale = ("TFLOP", 1e12) if whole >= 1e12 else ("GFLOP", 1e9)
    work.add_column(unit, justify="right")
    for name, value in plan.flops.items():
        work.add_row(name, f"{value / scale:,.1f}")
    work.add_row("all", f"{whole / scale:,.1f}", style="bold")
    return Group(head, size, work, *map(Text, _closing(plan)))


def _closing(plan: MemoryPlan) -> list[str]:
    setting, needed = plan.setting, plan.gpus_needed
    card = f"{setting['memory bytes'] / 1e9:.0f} GB"
    fits = "it fits" if plan.fits else "it does NOT fit"
    hold = f"GPU of {card} holds" if needed == 1 else f"GPUs of {card} hold"
    least = f"{needed} {hold} it" if needed else f"no number of {card} GPUs does"
    speed = f"{setting['utilisation']:.0%} of {setting['flops'] / 1e12:.0f} TFLOP/s on each of {setting['gpus']}"
    return [
        f"{fits}; {least}.",
        f"{plan.seconds:.1f} s an iteration at {speed}.",
        *(f"note: {note}" for note in plan.notes),
    ]
