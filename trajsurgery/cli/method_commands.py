"""`trajsurgery explain METHOD` and `trajsurgery prove METHOD`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from trajsurgery.plans.nodes import Velocity
from trajsurgery.plans.plan import Plan


@dataclass(frozen=True)
class Explain:
    """Show a plan that a method draws: its arrows, its gradient in closed form, its model calls."""

    method: Positional[str]
    """LeapAlign, DRTune, ...; or your own, MODULE:NAME or FILE.py:NAME."""
    steps: int = 25
    """Sampler steps."""
    seed: int = 0
    """Of the draw."""
    picture: Path | None = None
    """A file for the plan's picture: .svg, .png or .pdf."""


@dataclass(frozen=True)
class Prove:
    """Prove a method's gradient: every way of running against the closed form, forward mode and finite differences."""

    method: Positional[str]
    """LeapAlign, DRTune, ...; or your own, MODULE:NAME or FILE.py:NAME."""
    draws: int = 5
    """Plans to prove."""
    steps: int | None = None
    """Sampler steps; by default as few as the method takes."""


def explain(options: Explain, console: Console) -> int:
    """Print the plan of a method; return the exit code."""
    import torch

    from trajsurgery.training.method_names import load_method

    method = load_method(options.method)
    plan = method.draw(options.steps, torch.Generator().manual_seed(options.seed))
    summary = (inspect.getdoc(method) or type(method).__name__).partition("\n\n")[0]
    lines = {
        "method": f"{method}\n{summary}",
        "plan": str(plan),
        "steps": timeline(plan, options.steps),
        "gradient": str(plan.gradient()),
        "cost": str(plan.cost(options.steps)),
    }
    for title, text in lines.items():
        console.print(f"[bold]{title}[/]", highlight=False)
        for line in text.splitlines():
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if options.picture is not None:
        console.print(f"Picture: {plan.draw(options.picture)}", markup=False, highlight=False)
    return 0


def timeline(plan: Plan, steps: int) -> str:
    """Return the sampler's steps as a line of marks, from noise to image, and what the marks mean."""
    calls = {node.t for node in plan.nodes if isinstance(node, Velocity)}
    marks = "".join("●" if t in calls else "·" for t in range(steps, 0, -1))
    return f"t = {steps} {marks} 1   ● model call with gradient, · without"


def prove(options: Prove, console: Console) -> int:
    """Prove a method and print how far each check misses; return the exit code."""
    from trajsurgery.testing import check_gradient
    from trajsurgery.training.method_names import load_method

    method = load_method(options.method)
    try:
        with console.status(f"{options.draws} plans are proved"):
            proof = check_gradient(method, draws=options.draws, steps=options.steps)
    except AssertionError as error:
        console.print("[bold red]not proved[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(str(proof), markup=False, highlight=False)
    return 0
