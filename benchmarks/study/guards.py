"""A reward that invites hacking, and the effect of each guard: none, early stop, anchor, mixture of rewards.

    python -m benchmarks.study.guards

The reward is the brightness of a picture, whatever its prompt: white pictures are best. Every few iterations every run
is validated on two scorers that it does not train on; validation changes no draw, so that the run with early stop
equals the unguarded one up to where it ends. Writes guards.json and guards.png to results/. Fails unless the reward
rises and scorer b falls without a guard, and every guard leaves scorer b higher than no guard does. About six minutes
on one core.

The rate and the strengths of anchor and mixture were set by hand after two trials on the same seed, in which the guards
held as well: with an anchor ten times as strong neither brightness nor scorer b moves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.provenance import provenance
from trajsurgery.cli.train_command import main as run
from trajsurgery.methods import LeapAlign
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.presets import presets
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Evaluation, Guards, Objective, Optimiser

RESULTS = Path(__file__).parent / "results"
REWARD, SCORERS = "guards:Brightness", ("tiny:scorer_b", "tiny:scorer_c")
COLOURS = {"none": "#b3442e", "early stop": "#0b6e99", "anchor": "#6a4c93", "mixture": "#2e7d32"}


class Brightness:
    """reward(images, prompts): the mean of all pixels; 1 is white."""

    threshold = 1.0
    scale = "mean of the pixels, in [0, 1]"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the mean of the pixels, Float[batch]."""
        return images.mean((1, 2, 3))


@dataclass(frozen=True)
class Options:
    """Budget, and the strengths of the guards."""

    iterations: int = 80
    batch: int = 16
    rate: float = 5e-5
    every: int = 5
    """Iterations between validations."""
    patience: int = 2
    anchor: float = 0.3
    mixture: str = f"1*{REWARD}+1*tiny"
    threshold: float = 1.5
    """The hinge threshold of the mixture: brightness 1 and a cosine of 0.5."""
    looks: int = 48
    """Images of a validation."""
    images: int = 240
    """Held-out images at the end."""
    seed: int = 0
    output: Path = RESULTS
    runs: Path = Path("outputs/guards")
    """Folder of the runs; finished runs in it are read, not repeated."""


def recipes(options: Options) -> dict[str, Recipe]:
    """Return the four recipes by name."""
    basis = presets(LeapAlign(), "")["tiny"]
    none = replace(
        basis,
        reward=REWARD,
        objective=Objective(threshold=1.0, tau=0.02),
        rollout=replace(basis.rollout, batch=options.batch),
        optimiser=Optimiser(rate=options.rate),
        iterations=options.iterations,
        evaluation=Evaluation(images=options.images, pictures=12, metrics=SCORERS),
        guards=Guards(every=options.every, images=options.looks, by=SCORERS[0]),
        ema=0.9,
        seed=options.seed,
    )
    recipes = {
        "none": none,
        "early stop": replace(none, guards=replace(none.guards, patience=options.patience)),
        "anchor": replace(none, guards=replace(none.guards, anchor=options.anchor)),
        "mixture": replace(none, reward=options.mixture, objective=Objective(threshold=options.threshold, tau=0.02)),
    }
    return {name: replace(recipe, output=options.runs / name.replace(" ", "_")) for name, recipe in recipes.items()}


def brightness(record: Mapping[str, Any], when: str = "") -> float:
    """Return the brightness of a validation, or of the evaluation before or after; of a mixture, that part."""
    part = next((value for name, value in record["metrics"].items() if REWARD in name), None)
    if not when:
        return record["reward"] if part is None else part
    return (record if part is None else part)[f"reward_{when}"]


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw reward, scorers and rules of the validations, a line for each run; a ring marks the weights kept."""
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    panels = {
        "brightness, the reward": brightness,
        "scorer b, not trained on": lambda validation: validation["metrics"][SCORERS[0]],
        "scorer c, not trained on": lambda validation: validation["metrics"][SCORERS[1]],
        "share that the rules call right": lambda validation: validation["rule"],
    }
    for axes, (title, value) in zip(figure.subplots(1, 4), panels.items()):
        for name, entry in record["runs"].items():
            validations, kept_iteration = entry["looks"], entry["evaluation"]["guards"]["kept"]
            times = [validation["iteration"] for validation in validations]
            values = [value(validation) for validation in validations]
            shown = {"color": COLOURS[name], "alpha": 0.4 if name == "none" else 1, "label": name}
            axes.plot(times, values, linewidth=4.5 if name == "none" else 1.8, **shown)
            index = times.index(kept_iteration)
            ring = {"color": COLOURS[name], "markersize": 9, "fillstyle": "none", "markeredgewidth": 2}
            axes.plot(times[index], values[index], "o", **ring)
        axes.set(title=title, xlabel="iteration")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "a reward made to be hacked: validation prompts, averaged weights; a ring: the weights that are kept"
    )
    figure.savefig(path, dpi=150)


def results_table(record: Mapping[str, Any]) -> str:
    """Return the held-out figures before and after as a Markdown table."""
    lines = ["| guard | kept iteration | brightness | scorer b | scorer c | rules |", "|---|---|---|---|---|---|"]
    for name, entry in record["runs"].items():
        line = entry["evaluation"]
        scorer_records = [line["metrics"][scorer] for scorer in SCORERS]
        gains = [f"{scorer['reward_gain']:+.3f} ± {scorer['reward_gain_se']:.3f}" for scorer in scorer_records]
        rules = f"{line['rule_before']:.3f} -> {line['rule_after']:.3f}"
        bright = f"{brightness(line, 'before'):.3f} -> {brightness(line, 'after'):.3f}"
        lines.append(f"| {name} | {line['guards']['kept']} | {bright} | {' | '.join(gains)} | {rules} |")
    return "\n".join(lines)


def failed_promises(record: Mapping[str, Any]) -> list[str]:
    """Return a message for each claim about the guards that does not hold."""
    gains = {name: entry["evaluation"]["metrics"][SCORERS[0]]["reward_gain"] for name, entry in record["runs"].items()}
    none = record["runs"]["none"]["evaluation"]
    failures = [] if brightness(none, "after") > brightness(none, "before") else ["the reward did not rise"]
    failures += [] if gains["none"] < 0 else ["scorer b did not fall without a guard"]
    if not record["runs"]["early stop"]["evaluation"]["guards"]["stopped"]:
        failures.append("the run was not stopped")
    return failures + [f"{name} did not help" for name in list(gains)[1:] if not gains[name] > gains["none"]]


def main(options: Options) -> int:
    """Run all four, write, and return 1 if a claim does not hold."""
    runs: dict[str, Any] = {}
    for name, recipe in recipes(options).items():
        evaluation = run(recipe)
        if evaluation is None:
            return 130
        validations = [line for line in Log(recipe.output / METRICS).read() if line["kind"] == "look"]
        runs[name] = {"evaluation": evaluation, "looks": validations, "recipe": recipe.to_dict()}
    record = {**provenance(), "runs": runs}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "guards.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, options.output / "guards.png")
    print(results_table(record))
    failed = failed_promises(record)
    print("the guards:", failed or "held")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
