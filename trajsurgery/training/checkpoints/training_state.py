"""What changes in the course of a run: weights, averages, moments, counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from trajsurgery.training.anchor import Anchor
from trajsurgery.training.averages import start_averages
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.early_stopping import EarlyStopping
from trajsurgery.training.faults.loss_range import LossRange
from trajsurgery.training.optimisers import make_optimiser
from trajsurgery.training.recipe import Recipe


@dataclass(eq=False)
class TrainingState:
    """Everything that changes in the course of a run."""

    module: nn.Module
    optimiser: torch.optim.Optimizer
    ema: EMAModel
    before: dict[str, Any] | None = None
    """Held-out scores of the untuned model (`evaluation.held_out.HeldOutScores.to_dict`)."""
    iteration: int = 0
    """Finished iterations."""
    skipped: int = 0
    """Iterations that changed nothing because loss or gradient were not finite."""
    in_a_row: int = 0
    """Such iterations since the last one that changed something."""
    steps: int = 0
    """Iterations whose gradient was above 0 and was stepped."""
    started: list[float] | None = None
    """The weights' `fingerprint` before the first iteration."""
    looked: bool = False
    """Whether missing gradients were looked for (missing_gradients.py)."""
    seconds: float = 0.0
    """Wall-clock time of the run so far, without interruptions."""
    parameters: list[nn.Parameter] = field(default_factory=list[nn.Parameter])
    names: list[str] = field(default_factory=list[str])
    """The parameters' names in the module."""
    anchor: Anchor | None = None
    """The penalty against drifting from the base model (anchor.py)."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    loss_range: LossRange = field(default_factory=LossRange)
    """Since when the loss is out of its range."""
    saved: tuple[int, int] | None = None
    """`position` of the last checkpoint."""
    on_save: Callable[[Path], None] | None = None
    """Called with the folder of each checkpoint that is written."""

    @classmethod
    def start(cls, recipe: Recipe, module: nn.Module) -> TrainingState:
        """Return the state of a run that has not begun."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        names, parameters = list(trained), list(trained.values())
        optimiser = make_optimiser(recipe.optimiser, parameters)
        anchor = Anchor(module, recipe.guards.anchor, recipe.seed) if recipe.guards.anchor else None
        ema = start_averages([sharding.local(p.detach()) for p in parameters], recipe.ema, recipe.ema_on == "cpu")
        return cls(module, optimiser, ema, parameters=parameters, names=names, anchor=anchor)

    @property
    def position(self) -> tuple[int, int]:
        """The last iteration and the last validation round."""
        return self.iteration, self.early_stopping.last

    @property
    def finite(self) -> bool:
        """Whether weights and their averages hold neither NaN nor Inf. Waits for the device."""
        norms = [torch.nn.utils.get_total_norm(tensors).cpu() for tensors in (self.local, self.ema.shadow_params)]
        return not ranks.any_rank(not bool(torch.stack(norms).isfinite().all()))

    def fingerprint(self) -> list[float]:
        """Return each parameter's sum in float64, which a step changes. Waits for the device."""
        sums = [weights.sum(dtype=torch.float64) for weights in self.local]
        return ranks.total(torch.stack(sums)).tolist()

    @property
    def local(self) -> list[Tensor]:
        """This rank's shards of the parameters, which share their memory."""
        return [sharding.local(p.detach()) for p in self.parameters]

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averaged weights by the names of the parameters; of a sharded parameter, sharded as it is."""
        pairs = zip(self.names, self.ema.shadow_params, self.parameters, strict=True)
        return {name: sharding.sharded_like(average, parameter) for name, average, parameter in pairs}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name. They share their memory with the run's."""
        sharding.release(self.module)
        weights = {name: p.detach() for name, p in zip(self.names, self.parameters, strict=True)}
        moments = {
            f"{name}.{key}": value
            for name, p in zip(self.names, self.parameters, strict=True)
            for key, value in self.optimiser.state.get(p, {}).items()
        }
        groups = {"weights": weights, "averages": self.averages, "optimiser": moments}
        return {f"{group}.{name}": value for group, entries in groups.items() for name, value in entries.items()}

    def counters(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the tensors."""
        return {
            "ema": {name: value for name, value in self.ema.state_dict().items() if name != "shadow_params"},
            "before": self.before,
            "iteration": self.iteration,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "steps": self.steps,
            "started": self.started,
            "looked": self.looked,
            "seconds": self.seconds,
            "loss_range": asdict(self.loss_range),
            "early_stopping": asdict(self.early_stopping),
        }

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        """Set what `counters` returned."""
        self.ema.load_state_dict(counters["ema"])
        self.before, self.seconds, self.looked = counters["before"], counters["seconds"], counters["looked"]
        self.iteration, self.skipped, self.in_a_row = (counters[n] for n in ("iteration", "skipped", "in_a_row"))
        self.steps, self.started = counters["steps"], counters["started"]
        self.loss_range = LossRange(**counters["loss_range"])
        self.early_stopping = EarlyStopping(**counters["early_stopping"])

    def allocate_moments(self) -> None:
        """Let the optimiser make its moments, which a checkpoint is then read into."""
        get_optimizer_state_dict(self.module, self.optimiser)
