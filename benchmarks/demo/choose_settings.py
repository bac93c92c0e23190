"""How the demo's settings are chosen: runs on validation prompts and other seeds, varying one setting at a time.

    python -m benchmarks.demo.choose_settings

Measures the distances of LeapAlign's leaps (tau is a length in latent space), then varies one setting at a time around
the centre, each on every seed, and writes results/choose.json: reward, rules and junk, before and after. Finished runs
are read, not repeated. The committed choose.json varies the rate; lambda, tau and the number of iterations were chosen
in the first world, whose reward is the same. Four minutes a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro

from benchmarks.provenance import provenance
from trajsurgery import LeapAlign, distances, operate
from trajsurgery.cli.train_command import main as run
from trajsurgery.training.components import PromptCache, load
from trajsurgery.training.objective import landings
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Objective
from trajsurgery.training.training_loop import iteration_generator

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """The centre, and the values that are tried around it."""

    rate: float = 3e-5
    tau: float = 0.02
    """About the lower quartile of the distances."""
    threshold: float | None = 0.45
    """lambda; None: the reward's own threshold."""
    rates: tuple[float, ...] = (6e-5,)
    """Rates besides the centre's."""
    lambdas: tuple[float, ...] = ()
    """Thresholds besides the centre's."""
    taus: tuple[float, ...] = ()
    """Values of tau besides the centre's."""
    longer: tuple[int, ...] = ()
    """Numbers of iterations besides the centre's."""
    seeds: tuple[int, ...] = (100, 101)
    iterations: int = 225
    images: int = 480
    threads: int = 1
    """Seeds may run side by side, each with `--seeds`; a last call with all of them reads the finished runs."""
    plans: int = 40
    """Rollouts on which distances are measured."""
    output: Path = RESULTS
    runs: Path = Path("outputs/choose")


def centre_recipe(options: Options) -> Recipe:
    """Return the demo's recipe on validation prompts, with the centre's settings."""
    objective = Objective(threshold=options.threshold, tau=options.tau)
    chosen = replace(presets(LeapAlign(), "")["tiny"], objective=objective)
    chosen = replace(chosen, optimiser=replace(chosen.optimiser, rate=options.rate))
    evaluation = replace(chosen.evaluation, images=options.images, split="validation")
    return replace(chosen, evaluation=evaluation, iterations=options.iterations, threads=options.threads)


def variants(options: Options) -> Iterator[tuple[str, Recipe]]:
    """Yield (name, recipe), one setting changed at a time."""
    base = centre_recipe(options)
    for rate in dict.fromkeys((base.optimiser.rate, *options.rates)):
        yield f"rate {rate:g}", replace(base, optimiser=replace(base.optimiser, rate=rate))
    for threshold in options.lambdas:
        yield f"lambda {threshold:g}", replace(base, objective=replace(base.objective, threshold=threshold))
    for tau in options.taus:
        yield f"tau {tau:g}", replace(base, objective=replace(base.objective, tau=tau))
    for iterations in options.longer:
        yield f"iterations {iterations}", replace(base, iterations=iterations)


def measure_distances(options: Options) -> dict[str, Any]:
    """Return quantiles of the untuned model's leap distances, over random plans; steps of the sampler left out."""
    recipe = centre_recipe(options)
    torch.set_num_threads(recipe.threads)
    world = load(recipe)
    embeddings, leap_distances = PromptCache(world.pipe, world.texts), list[torch.Tensor]()
    rollout = recipe.rollout
    for number in range(options.plans):
        texts = world.draw(16, iteration_generator(options.seeds[0], number, "prompts"))
        with operate(world.pipe) as surgery:
            world.pipe(
                **embeddings(texts),
                num_inference_steps=rollout.steps,
                guidance_scale=rollout.guidance,
                height=rollout.size,
                width=rollout.size,
                generator=iteration_generator(options.seeds[0], number, "noise"),
                output_type="latent",
            )
        plan = recipe.method.draw(rollout.steps, iteration_generator(options.seeds[0], number, "plan"))
        by_landing = distances(plan, surgery.trajectory, surgery.field)
        landed = torch.cat([by_landing[t] for t in landings(plan, surgery.trajectory)])
        leap_distances.append(landed[landed > 0])  # the sampler's own steps miss nothing, whatever the model
    shares = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
    values = torch.cat(leap_distances).quantile(torch.tensor(shares)).tolist()
    return {f"{share:g}": round(value, 4) for share, value in zip(shares, values)}


def main(options: Options) -> int:
    """Run all variants; write the results after each run."""
    record: dict[str, Any] = {**provenance(), "distances": measure_distances(options), "variants": {}}
    print("quantiles of the distances:", record["distances"])
    options.output.mkdir(parents=True, exist_ok=True)
    for name, recipe in variants(options):
        for seed in options.seeds:
            folder = options.runs / name.replace(" ", "_") / str(seed)
            evaluation = run(replace(recipe, seed=seed, output=folder))
            if evaluation is None:
                return 130
            record["variants"].setdefault(name, {})[str(seed)] = evaluation
            (options.output / "choose.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, lines in record["variants"].items():
        gains = {key: [round(line[f"{key}_gain"], 4) for line in lines.values()] for key in ("reward", "rule", "junk")}
        print(f"{name:16}", gains)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
