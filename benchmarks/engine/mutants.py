"""Share of the core's mutants that the tests kill: a fixed-seed sample of cosmic-ray's, with its 95% interval.

    pip install cosmic-ray
    python -m benchmarks.engine.mutants

A mutant is a copy of the package with one operator, number, comparison, keyword or decorator changed. Every mutant runs
the same selection of tests (`TESTS`, about ten seconds of one core) until the first failure, in a fork of a process
that has loaded torch already. Mutants that do not compile or that change annotations only are not drawn. Outcomes are
logged line by line in outputs/mutants.jsonl, so that an interrupted run continues; mutants.json and mutants.png are
written to results/. `EQUIVALENT` gives the reason why no test can see a remaining survivor. About six minutes on one
core.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.engine.cosmic_ray_mutants import Mutant, possible_changes
from benchmarks.engine.equivalent_mutants import EQUIVALENT
from benchmarks.engine.forked_tests import ForkedTests, Outcome
from benchmarks.provenance import provenance

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]

FILES = (
    "surgery/autograd_functions.py",
    "surgery/velocity_calls.py",
    "surgery/execution.py",
    "plans/closed_form.py",
    "plans/derivatives.py",
    "plans/interpolants.py",
    "plans/legality.py",
    "plans/rules.py",
)
"""The core: gradient edits, execution, closed forms, interpolants, legality."""

TESTS = (
    *(
        "surgery/test_by_hand.py",
        "surgery/test_growing_by_hand.py",
        "plans/test_closed_form_by_hand.py",
        "plans/test_rules_by_hand.py",
    ),
    *(
        "surgery/test_borders_by_hand.py",
        "surgery/test_recompute_by_hand.py",
        "surgery/test_autograd_values.py",
        "surgery/test_autograd_derivatives.py",
        "surgery/test_run_errors.py",
    ),
    *("surgery/test_bad_arguments.py", "plans/test_closed_form_paper.py"),
    *("plans/test_step_gain.py", "surgery/test_per_sample_by_hand.py"),
)
"""The selection, as paths below tests/."""

RUN_FIRST = {
    "surgery/autograd_functions.py": (
        "surgery/test_recompute_by_hand.py",
        "surgery/test_autograd_values.py",
        "surgery/test_autograd_derivatives.py",
    ),
    "plans/closed_form.py": ("plans/test_closed_form_by_hand.py", "surgery/test_borders_by_hand.py"),
    "plans/derivatives.py": (
        "plans/test_closed_form_by_hand.py",
        "surgery/test_borders_by_hand.py",
        "plans/test_step_gain.py",
    ),
    "plans/interpolants.py": ("plans/test_closed_form_by_hand.py", "surgery/test_borders_by_hand.py"),
    "plans/legality.py": ("plans/test_rules_by_hand.py", "surgery/test_borders_by_hand.py"),
    "plans/rules.py": ("plans/test_rules_by_hand.py", "surgery/test_borders_by_hand.py"),
}
"""Tests of the selection that run first for a file; else surgery/test_by_hand.py. A mutant that survives them runs all
others.
"""

DESELECTED = ("surgery/test_autograd_derivatives.py::test_jacobians",)
"""Tests that are left out of the selection."""


@dataclass(frozen=True)
class Options:
    """Size of the sample, and limits."""

    sample: int = 300
    seed: int = 0
    limit: int = 20
    """CPU seconds after which a mutant counts as hanging."""
    only: str = ""
    """Only mutants of files whose path contains this; results are then printed and not written."""
    baseline: bool = False
    """Only run the selection on the unchanged package, and print how long it takes."""


def main(options: Options) -> int:
    """Run the sample, write the results, and print the survivors; return 1 if the unchanged package fails."""
    origin, log = provenance(), ROOT / "outputs" / "mutants.jsonl"
    log.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tests = ForkedTests(ROOT, Path(folder), TESTS, DESELECTED, options.limit)
        untouched = tests.run(None, TESTS[:1])
        print(f"the selection: {untouched.cpu:.1f} s of CPU, {untouched.seconds:.1f} s in all, {untouched.verdict}")
        if options.baseline or untouched.verdict != "survived":
            print("\n".join(tests.slowest), untouched.test)
            return int(untouched.verdict != "survived")
        outcomes = list(run_sample(options, tests, log))
    if not options.only:
        write_results(options, outcomes, untouched, origin)
    for mutant, outcome in outcomes:
        if outcome.verdict == "survived":
            print(f"{mutant.file}:{mutant.line} {mutant.operator}\n  - {mutant.old}\n  + {mutant.new}")
            print(f"  {equivalence_reason(mutant)}")
    return 0


def draw_sample(options: Options, package: Path) -> Iterator[Mutant]:
    """Yield the mutants, in an order that depends on the seed and the sources alone."""
    every = [(file, *place) for file in FILES for place in possible_changes(package / file)]
    random.Random(options.seed).shuffle(every)
    count = 0
    for file, operator, occurrence in every:
        if options.only in file and count < options.sample:
            mutant = Mutant.create(package, file, operator, occurrence)
            if mutant is not None:
                count += 1
                yield mutant


def run_sample(options: Options, tests: ForkedTests, log: Path) -> Iterator[tuple[Mutant, Outcome]]:
    """Yield each mutant with its outcome: from the log if this file has run against these tests before."""
    digest = hashlib.sha1()
    for test in sorted(TESTS):
        digest.update((tests.copy / "tests" / test).read_bytes())
    outcomes: dict[str, Outcome] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        entry = json.loads(line)
        outcomes[entry["key"]] = Outcome(**entry["outcome"])
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("mutants", total=options.sample)
        for i, mutant in enumerate(draw_sample(options, tests.copy / "trajsurgery")):
            key = f"{mutant.key} {digest.hexdigest()[:12]}"
            if key not in outcomes:
                outcomes[key] = tests.run(mutant, RUN_FIRST.get(mutant.file, TESTS[:1]))
                with log.open("a") as file:
                    file.write(json.dumps({"key": key, "outcome": asdict(outcomes[key])}) + "\n")
                if progress.disable:
                    print(f"{i + 1}/{options.sample} {mutant.file}:{mutant.line} {outcomes[key].verdict}", flush=True)
            progress.advance(task)
            yield mutant, outcomes[key]


def equivalence_reason(mutant: Mutant) -> str:
    """Return why the mutant behaves as the package does, or ""."""
    return EQUIVALENT.get((mutant.file, mutant.old, mutant.new), "")


def wilson_interval(share: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson's score interval)."""
    p, n = share / of, of
    centre, width = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return (centre - width) / (1 + z**2 / n), (centre + width) / (1 + z**2 / n)


def write_results(
    options: Options, outcomes: list[tuple[Mutant, Outcome]], untouched: Outcome, origin: dict[str, Any]
) -> None:
    """Write mutants.json and mutants.png."""
    verdicts = Counter(outcome.verdict for _, outcome in outcomes)
    killed = len(outcomes) - verdicts["survived"]
    equivalent = sum(outcome.verdict == "survived" and bool(equivalence_reason(mutant)) for mutant, outcome in outcomes)
    low, high = wilson_interval(killed, len(outcomes))
    record: dict[str, Any] = {
        "mutants": len(outcomes),
        "killed": killed,
        "of these hanging": verdicts["hangs"],
        "survived": verdicts["survived"],
        "of these equivalent": equivalent,
        "share killed": round(killed / len(outcomes), 4),
        "95% interval": [round(low, 4), round(high, 4)],
        "share killed of those that are not equivalent": round(killed / (len(outcomes) - equivalent), 4),
        "seed": options.seed,
        "selection": {"tests": list(TESTS), "seconds of CPU": untouched.cpu, "Hypothesis profile": "mutants"},
        "seconds of CPU in all": round(sum(outcome.cpu for _, outcome in outcomes), 1),
        "survivors": [
            {
                **{name: getattr(mutant, name) for name in ("file", "line", "operator", "old", "new")},
                "why": equivalence_reason(mutant),
            }
            for mutant, outcome in outcomes
            if outcome.verdict == "survived"
        ],
        **origin,
    }
    record["versions"] |= {name: version(name) for name in ("cosmic-ray", "hypothesis", "pytest", "sympy")}
    (RESULTS / "mutants.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    draw_picture(outcomes, f"{killed} of {len(outcomes)} mutants killed ({100 * low:.1f}% to {100 * high:.1f}%)")


def draw_picture(outcomes: list[tuple[Mutant, Outcome]], title: str) -> None:
    """Draw how many were killed and survived, by file and by kind of change."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("file", "kind"), strict=True):
        names = sorted({getattr(mutant, kind) for mutant, _ in outcomes}, reverse=True)
        dead = [sum(getattr(m, kind) == name and o.verdict != "survived" for m, o in outcomes) for name in names]
        alive = [sum(getattr(m, kind) == name and o.verdict == "survived" for m, o in outcomes) for name in names]
        axes.barh(names, dead, color="#4C72B0", label="killed")
        axes.barh(names, alive, left=dead, color="#DD8452", label="survived")
        for i, (a, b) in enumerate(zip(dead, alive, strict=True)):
            axes.text(a + b, i, f" {a}/{a + b}", va="center", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.15 * max(a + b for a, b in zip(dead, alive, strict=True)))
        axes.set_xlabel("mutants")
    axes.legend(frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=11)
    figure.savefig(RESULTS / "mutants.png", dpi=130)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
