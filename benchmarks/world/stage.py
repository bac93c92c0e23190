"""A resumable training loop for all stages: a step depends on its number only, so a killed run resumes bit for bit."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

LossAt = Callable[[int, Generator], Tensor]


@dataclass(frozen=True)
class Budget:
    """Length and learning rate of a stage. The rate rises over the first 3% of the steps and then falls to zero."""

    steps: int
    rate: float
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    average: float = 0.998  # of the exponential moving average of the weights
    clip: float = 1.0
    seed: int = 0
    save_every: int = 250

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step in 0..steps-1."""
        warm = max(1, round(0.03 * self.steps))
        return self.rate * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm), 1.0)


@dataclass
class Stage:
    """A training stage: modules, loss and report. `loss` gets the step and a generator of that step's own.

    `report` is called with the averaged weights in place every `report_every` steps and returns a line for the log.
    """

    name: str
    modules: nn.ModuleDict
    loss: LossAt
    budget: Budget
    report: Callable[[], str] | None = None
    report_every: int = 1000
    averages: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.modules.named_parameters() if p.requires_grad)


def step_generator(seed: int, step: int) -> Generator:
    """Return the generator of one step: no state is carried from step to step, so none has to be saved."""
    return Generator().manual_seed(seed * 1_000_003 + step)


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Save to a temporary file and rename it: a killed process leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _with_averages(stage: Stage, action: Callable[[], str]) -> str:
    training_weights = {name: p.detach().clone() for name, p in stage.named_parameters()}
    with torch.no_grad():
        for name, p in stage.named_parameters():
            p.copy_(stage.averages[name])
        stage.modules.eval()
        line = action()
        stage.modules.train()
        for name, p in stage.named_parameters():
            p.copy_(training_weights[name])
    return line


def _update(stage: Stage, optimiser: torch.optim.Optimizer, step: int) -> float:
    budget = stage.budget
    for group in optimiser.param_groups:
        group["lr"] = budget.rate_at(step)
    loss = stage.loss(step, step_generator(budget.seed, step))
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for _, p in stage.named_parameters()], budget.clip)
    optimiser.step()
    # An average that starts slowly would keep the untrained weights for a thousand steps.
    pull = 1 - min(budget.average, (step + 1) / (step + 10))
    for name, p in stage.named_parameters():
        stage.averages[name].lerp_(p.detach(), pull)
    return float(loss.detach())


def _restore(stage: Stage, optimiser: torch.optim.Optimizer, path: Path) -> int:
    """Load a checkpoint, if there is one; return the number of steps done."""
    stage.averages = {name: p.detach().clone() for name, p in stage.named_parameters()}
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    stage.modules.load_state_dict(state["modules"])
    optimiser.load_state_dict(state["optimiser"])
    stage.averages = state["averages"]
    return int(state["step"])


def run(stage: Stage, folder: Path, say: Callable[[str], None] = print) -> None:
    """Train the stage to its end and leave the averaged weights in its modules, in eval mode.

    Its state is saved to `<folder>/<name>.checkpoint.pt` every `save_every` steps; a later run continues from it.
    """
    path, budget = folder / f"{stage.name}.checkpoint.pt", stage.budget
    stage.modules.train()
    parameters = [p for _, p in stage.named_parameters()]
    optimiser = torch.optim.AdamW(parameters, budget.rate, budget.betas, weight_decay=budget.weight_decay)
    step = _restore(stage, optimiser, path)
    if step:
        say(f"{stage.name}: goes on from step {step}")
    total, since, began = 0.0, 0, time.monotonic()
    while step < budget.steps:
        total, since, step = total + _update(stage, optimiser, step), since + 1, step + 1
        if step % 100 == 0 or step == budget.steps:
            each = (time.monotonic() - began) / since
            say(f"{stage.name}: step {step}/{budget.steps} loss {total / since:.4f} {each:.3f} s/step")
            total, since, began = 0.0, 0, time.monotonic()
        if stage.report is not None and (step % stage.report_every == 0 or step == budget.steps):
            say(f"{stage.name}: step {step} {_with_averages(stage, stage.report)}")
        if step % budget.save_every == 0 or step == budget.steps:
            state = {"modules": stage.modules.state_dict(), "optimiser": optimiser.state_dict()}
            save_atomically({**state, "averages": stage.averages, "step": step}, path)
    with torch.no_grad():
        for name, p in stage.named_parameters():
            p.copy_(stage.averages[name])
    stage.modules.eval()
