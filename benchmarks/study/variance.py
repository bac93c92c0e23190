"""Several plans per rollout, and separate times for each sample: effect on the gradient's variance and on the reward.

    python -m benchmarks.study.variance

Gradients: for each of 64 independent draws of prompts and noise, a rollout of the untuned embedded Flux, eight plans
that all samples share and two sets of per-sample plans, and the gradient of the recipe's loss along each. Written: the
trace of the covariance of the whole gradient over the squared norm of its mean, for M plans per rollout, with 95%
intervals (jackknife over 16 groups of draws); the part of the times, and of prompts and noise; seconds of a gradient,
of CPU and of the clock; and the product of variance and time, which says how fast a mean is estimated. Rewards:
trainings of equal CPU time (variance_runs.py). Finished parts in the folder of runs are read, so that parts can be made
side by side (`--methods`, `--part`). Writes variance.json and variance.png to results/. About 40 minutes on one core.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro
from torch import Tensor

from benchmarks.provenance import provenance
from benchmarks.study.variance_picture import draw
from benchmarks.study.variance_runs import METHODS, Trainings, compare_rewards
from trajsurgery import PerSample, Plan, backward, distances, operate
from trajsurgery.training import objective
from trajsurgery.training.components import PromptCache, RunComponents, hinge_threshold, load, pipeline_arguments
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import iteration_generator

RESULTS = Path(__file__).parent / "results"
SHARED, ALONE = (1, 2, 4, 8), (1, 2)
GROUPS = 16


@dataclass(frozen=True)
class Options:
    """Draws, and trainings."""

    methods: tuple[str, ...] = tuple(METHODS)
    part: str = "all"
    """gradients, rewards, or all."""
    draws: int = 64
    """Draws of prompts and noise, in 16 groups."""
    seed: int = 1000
    trainings: Trainings = field(default_factory=Trainings)
    output: Path = RESULTS
    runs: Path = Path("outputs/variance")


class GradientBench:
    """The embedded world, and gradients of single plans on a rollout."""

    def __init__(self, method: str, seed: int) -> None:
        torch.set_num_threads(1)
        self.recipe: Recipe = presets(METHODS[method], "")["tiny"]
        self.seed = seed
        self.world: RunComponents = load(self.recipe)
        self.embeddings = PromptCache(self.world.pipe, self.world.texts, pipeline_arguments(self.recipe))
        self.threshold = hinge_threshold(self.recipe, self.world)
        self.params = [p for p in self.world.module.parameters() if p.requires_grad]
        self.seconds = {name: [0.0, 0.0, 0] for name in ("rollout", "shared", "per-sample")}

    def timed(self, name: str, what: Any, *args: Any) -> Any:
        """Call `what`, and add its CPU seconds, clock seconds and count to the totals."""
        cpu, clock = time.process_time(), time.perf_counter()
        result = what(*args)
        spent = time.process_time() - cpu, time.perf_counter() - clock, 1
        self.seconds[name] = [a + b for a, b in zip(self.seconds[name], spent)]
        return result

    def roll_out(self, number: int) -> tuple[Any, Tensor]:
        """Return a rollout and d(loss)/d(x_0), before the weights."""
        recipe = self.recipe
        texts = self.world.draw(recipe.rollout.batch, iteration_generator(self.seed, number, "prompts"))
        with operate(self.world.pipe) as surgery:
            self.world.pipe(
                **self.embeddings(texts),
                **pipeline_arguments(recipe),
                num_inference_steps=recipe.rollout.steps,
                generator=iteration_generator(self.seed, number, "noise"),
                output_type="latent",
            )
        x_0 = surgery.trajectory[0].detach().requires_grad_()
        score = self.world.reward(surgery.decode(x_0), texts)
        (c,) = objective.cotangents(objective.loss([score], torch.ones_like(score), self.threshold), (x_0,))
        return surgery, c

    def plan_gradient(self, surgery: Any, cotangent: Tensor, draws: torch.Generator, per_sample: bool) -> Tensor:
        """Return the whole gradient of one plan, or of one plan for each sample, as a vector."""
        recipe, steps = self.recipe, self.recipe.rollout.steps
        plan: Plan | PerSample = recipe.method.draw(steps, draws)
        if per_sample:
            plan = PerSample(recipe.method.draw(steps, draws) for _ in cotangent)
        recorded = surgery.trajectory, surgery.field
        leap_distances = distances(plan, *recorded) if recipe.weights_at != "none" else {}
        w = objective.weights(plan, surgery.trajectory, leap_distances, recipe.weights_at, recipe.objective.tau).w
        for p in self.params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        backward(plan, *recorded, cotangent * w.to(cotangent).view(-1, *[1] * (cotangent.dim() - 1)), check=False)
        return torch.cat([p.grad.flatten() for p in self.params if p.grad is not None])

    def mean_gradients(self, number: int) -> dict[str, Tensor]:
        """Return {M plans: the mean of their gradients} on one rollout; "all" is the mean of all of them."""
        surgery, cotangent = self.timed("rollout", self.roll_out, number)
        draws, means, total = iteration_generator(self.seed, number, "plan"), dict[str, Tensor](), list[Tensor]()
        for kind, chosen in (("shared", SHARED), ("per-sample", ALONE)):
            added = torch.zeros(())
            for m in range(1, max(chosen) + 1):
                added = added + self.timed(kind, self.plan_gradient, surgery, cotangent, draws, kind == "per-sample")
                if m in chosen:
                    means[f"{kind} {m}"] = added / m
            total.append(added)
        return means | {"all": sum(total) / (max(SHARED) + max(ALONE))}


def measure_gradients(method: str, options: Options) -> dict[str, Any]:
    """Return sums by group of draws, from which all statistics follow, and seconds."""
    bench, sums, squares = GradientBench(method, options.seed), dict[str, Tensor](), dict[str, Tensor]()
    for number in range(options.draws):
        means = bench.mean_gradients(number)
        for name, gradient in means.items():
            group = number * GROUPS // options.draws
            sums.setdefault(name, torch.zeros(GROUPS, len(gradient)))[group] += gradient
            squares.setdefault(name, torch.zeros(GROUPS, dtype=torch.float64))[group] += float(
                gradient.double().square().sum()
            )
        print(method, number, flush=True)
    inner = {name: (s.double() @ s.double().T).tolist() for name, s in sums.items()}
    return {
        "inner": inner,
        "squares": {name: s.tolist() for name, s in squares.items()},
        "draws": options.draws,
        "seconds": {k: {"cpu": a / n, "clock": b / n} for k, (a, b, n) in bench.seconds.items()},
    }


def variance_statistics(raw: dict[str, Any], left_out: int | None = None) -> dict[str, float]:
    """Return {configuration: trace of the covariance over the squared norm of the mean}, and its parts."""
    groups = [g for g in range(GROUPS) if g != left_out]
    n = raw["draws"] * len(groups) // GROUPS
    trace, mean = dict[str, float](), dict[str, float]()
    for name, inner in raw["inner"].items():
        whole = float(torch.tensor(inner, dtype=torch.float64)[groups][:, groups].sum())
        trace[name] = (sum(raw["squares"][name][g] for g in groups) - whole / n) / (n - 1)
        mean[name] = whole / n**2 - trace[name] / n
    norm = mean["all"]  # all configurations have one mean: its best estimate serves them all
    statistics = {name: value / norm for name, value in trace.items()}
    times = (statistics["shared 1"] - statistics["shared 8"]) / (1 - 1 / 8)
    return statistics | {"of the times": times, "of prompts and noise": statistics["shared 1"] - times}


def summarise_variance(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the statistics with 95% jackknife intervals, costs, and products relative to one shared plan."""
    whole, parts = variance_statistics(raw), [variance_statistics(raw, g) for g in range(GROUPS)]
    seconds = raw["seconds"]

    def interval(of: Any) -> list[float]:
        values = [of(part) for part in parts]
        spread = ((GROUPS - 1) / GROUPS * sum((a - sum(values) / GROUPS) ** 2 for a in values)) ** 0.5
        return [round(of(whole) - 2.13 * spread, 4), round(of(whole) + 2.13 * spread, 4)]  # t of 15 degrees

    def line(name: str) -> dict[str, Any]:
        kind, m = name.rsplit(" ", 1)
        cost = {c: seconds["rollout"][c] + int(m) * seconds[kind][c] for c in ("cpu", "clock")}
        relative_cost = cost["cpu"] / (seconds["rollout"]["cpu"] + seconds["shared"]["cpu"])
        return {
            "variance": round(whole[name], 4),
            "interval": interval(lambda part: part[name]),
            "seconds": {c: round(s, 3) for c, s in cost.items()},
            "variance_by_time": round(whole[name] / whole["shared 1"] * relative_cost, 3),
            "variance_by_time_interval": interval(lambda part: part[name] / part["shared 1"] * relative_cost),
        }

    names = [name for name in raw["inner"] if name != "all"]
    of = [name for name in whole if name.startswith("of ")]
    return {
        "draws": raw["draws"],
        "seconds": {k: {c: round(s, 4) for c, s in v.items()} for k, v in seconds.items()},
        "plans": {name: line(name) for name in names},
        "parts": {
            name: {"variance": round(whole[name], 4), "interval": interval(lambda part, name=name: part[name])}
            for name in of
        },
    }


def main(options: Options) -> int:
    """Make what is missing of the chosen parts; write once everything exists."""
    options.runs.mkdir(parents=True, exist_ok=True)
    for method in options.methods:
        path = options.runs / f"gradients_{method}.json"
        if options.part in ("all", "gradients") and not path.exists():
            path.write_text(json.dumps(measure_gradients(method, options)))
    rewards_record = compare_rewards(
        options.trainings, options.methods, options.runs, make=options.part in ("all", "rewards")
    )
    raw = {m: options.runs / f"gradients_{m}.json" for m in METHODS}
    if rewards_record is None or not all(path.exists() for path in raw.values()):
        print("some parts are missing still: nothing written")
        return 0
    record = {
        **provenance(),
        "gradients": {m: summarise_variance(json.loads(path.read_text())) for m, path in raw.items()},
        "rewards": rewards_record,
    }
    (options.output / "variance.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, options.output / "variance.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
