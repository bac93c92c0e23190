"""Checkpoints: one file that is written whole or not at all, and a log that is cut back to it on resume.

All draws of an iteration follow from the seed and its number, so no generator state is saved. A run that was killed and
resumed equals one that was not, bit for bit (on one machine, with the same number of threads).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from trajsurgery.errors import RecipeError
from trajsurgery.training import ranks, sharding
from trajsurgery.training.anchor import Anchor
from trajsurgery.training.averages import start_averages
from trajsurgery.training.early_stopping import EarlyStopping
from trajsurgery.training.optimisers import make_optimiser
from trajsurgery.training.output_files import write_atomically
from trajsurgery.training.recipe import Recipe, differences

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"


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
    anchor: Anchor | None = None
    """The penalty against drifting from the base model (anchor.py)."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)

    @classmethod
    def start(cls, recipe: Recipe, module: nn.Module) -> TrainingState:
        """Return the state of a run that has not begun."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimiser = make_optimiser(recipe.optimiser, parameters)
        anchor = Anchor(module, recipe.guards.anchor, recipe.seed) if recipe.guards.anchor else None
        ema = start_averages([sharding.local(p.detach()) for p in parameters], recipe.ema, recipe.ema_on == "cpu")
        return cls(module, optimiser, ema, parameters=parameters, anchor=anchor)

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
    def local(self) -> list[torch.Tensor]:
        """This rank's shards of the parameters, which share their memory."""
        return [sharding.local(p.detach()) for p in self.parameters]

    @property
    def averages(self) -> list[torch.Tensor]:
        """The averaged weights, whole, on the first rank. All ranks call this together."""
        pairs = zip(self.ema.shadow_params, self.parameters, strict=True)
        return [sharding.collect(average, parameter) for average, parameter in pairs]

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint, with whole tensors. All ranks call this together."""
        return {
            "weights": [sharding.collect(p.detach()) for p in self.parameters],
            "optimiser": sharding.whole_state(self.optimiser.state_dict()),
            "ema": self.ema.state_dict() | {"shadow_params": self.averages},
            "before": self.before,
            "iteration": self.iteration,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "steps": self.steps,
            "started": self.started,
            "looked": self.looked,
            "seconds": self.seconds,
            "watch": asdict(self.early_stopping),
        }

    def set_averages(self, values: Sequence[torch.Tensor]) -> None:
        """Set the averaged weights to whole tensors."""
        for average, value, parameter in zip(self.ema.shadow_params, values, self.parameters, strict=True):
            average.copy_(sharding.local(sharding.shard_of(value, parameter)))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, on any number of ranks."""
        sharding.release(self.module)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(sharding.shard_of(value, parameter))
        self.optimiser.load_state_dict(sharding.sharded_optimiser_state(state["optimiser"], self.parameters))
        self.ema.load_state_dict({name: value for name, value in state["ema"].items() if name != "shadow_params"})
        self.set_averages(state["ema"]["shadow_params"])
        self.before = state["before"]
        self.iteration, self.skipped, self.in_a_row = state["iteration"], state["skipped"], state["in_a_row"]
        self.steps, self.started = state["steps"], state["started"]
        self.looked = state.get("looked", False)  # checkpoints of 0.1.0 have none
        self.seconds = state["seconds"]
        self.early_stopping = EarlyStopping(**state.get("watch", {}))


def save(recipe: Recipe, training: TrainingState) -> None:
    """Write the checkpoint into the run's output folder."""
    state = {"recipe": json.dumps(recipe.to_dict()), **training.state()}
    write_atomically(recipe.output / CHECKPOINT, lambda path: torch.save(state, path))


def resume(recipe: Recipe, training: TrainingState) -> bool:
    """Restore the checkpoint in the output folder, if there is one; return whether there was.

    Raises:
        RecipeError: it belongs to another recipe, is further than this one, or can't be read.
    """
    path = recipe.output / CHECKPOINT
    if recipe.overwrite or not path.exists():
        ranks.wait_for_all()  # all have seen that there is none
        if ranks.is_main():
            discard(recipe.output)
        return False
    state = _read(path)
    _same(recipe, state)
    try:
        training.restore(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{path} does not fit the model: {error}. {_WAYS_OUT}") from error
    ranks.wait_for_all()  # all have read it
    Log(recipe.output / METRICS).cut(training.iteration, training.early_stopping.last)
    return True


def discard(output: Path) -> None:
    """Delete the checkpoint, the log and the best weights of an earlier run."""
    for name in (CHECKPOINT, METRICS):
        (output / name).unlink(missing_ok=True)
    for path in (*output.glob("*.partial"), *output.glob("best-*.pt")):
        path.unlink()


_WAYS_OUT = "Pass --overwrite to discard that run, or --output with another folder."


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RecipeError(f"{path} can't be read ({error}). {_WAYS_OUT}") from error


def _same(recipe: Recipe, state: Mapping[str, Any]) -> None:
    changed = differences(json.loads(state["recipe"]), recipe.to_dict())
    if changed:
        raise RecipeError(
            f"{recipe.output} holds a run of another recipe, {state['iteration']} iterations long. It differs in\n  "
            + "\n  ".join(changed)
            + f"\n{_WAYS_OUT} To go on with it, run it with its own settings."
        )
    if state["iteration"] > recipe.iterations:
        raise RecipeError(
            f"{recipe.output} holds {state['iteration']} iterations of this recipe, more than the {recipe.iterations} "
            f"asked for. {_WAYS_OUT}"
        )


class Log:
    """metrics.jsonl: one line an iteration and validation round; the last line is the evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite become null. Of several ranks the first one writes."""
        if not ranks.is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        if not self.path.exists():
            return []
        records: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                records.append(json.loads(line))
        return records

    def cut(self, iteration: int, look: int = -1) -> None:
        """Drop the lines after an iteration and after a validation round, and a torn last line."""
        last = {"iteration": iteration, "look": look}
        records = [r for r in self.read() if r["kind"] in last and r["iteration"] <= last[r["kind"]]]
        text = "".join(map(_line, records))
        write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        items: Iterable[Any] = value
        return [_finite(inner) for inner in items]
    return None if isinstance(value, float) and not math.isfinite(value) else value
