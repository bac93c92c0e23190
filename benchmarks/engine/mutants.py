"""How many of the core's mutants do the tests kill? A fixed-seed sample of cosmic-ray's, with its 95% interval.

    pip install cosmic-ray
    python -m benchmarks.engine.mutants

A mutant is the package with one operator, number, comparison, keyword or decorator changed, in a copy. Every one runs
the same selection of tests (`TESTS`, at most ten seconds of one core) until the first failure, in a fork of a process
that has torch loaded already. Mutants that do not compile or that change annotations only are not drawn. Results are
kept line by line in outputs/mutants.jsonl, so that an interrupted run goes on; mutants.json and mutants.png are written
beside this file. `EQUIVALENT` says of every survivor that is left why no test could see it.
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
"""The core: what edits gradients, runs plans, derives closed forms, and says what is legal."""

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
)
"""The selection."""

RUN_FIRST = {
    "surgery/autograd_functions.py": (
        "surgery/test_recompute_by_hand.py",
        "surgery/test_autograd_values.py",
        "surgery/test_autograd_derivatives.py",
    ),
    "plans/closed_form.py": ("plans/test_closed_form_by_hand.py", "surgery/test_borders_by_hand.py"),
    "plans/derivatives.py": ("plans/test_closed_form_by_hand.py", "surgery/test_borders_by_hand.py"),
    "plans/interpolants.py": ("plans/test_closed_form_by_hand.py", "surgery/test_borders_by_hand.py"),
    "plans/legality.py": ("plans/test_rules_by_hand.py", "surgery/test_borders_by_hand.py"),
    "plans/rules.py": ("plans/test_rules_by_hand.py", "surgery/test_borders_by_hand.py"),
}
"""What of it runs first for a file; else test_by_hand.py. A mutant that survives runs all of it."""

DESELECTED = ("surgery/test_autograd_derivatives.py::test_jacobians",)
"""What is left out of it."""


@dataclass(frozen=True)
class Options:
    """Flags."""

    sample: int = 300
    seed: int = 0
    limit: int = 10
    """CPU seconds after which a mutant counts as hanging."""
    only: str = ""
    """Mutants of files whose name holds this."""
    baseline: bool = False
    """Only run the selection on the package as it is, and print how long it takes."""


def main(options: Options) -> int:
    origin, log = provenance(), ROOT / "outputs" / "mutants.jsonl"
    log.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = ForkedTests(ROOT, Path(folder), TESTS, DESELECTED, options.limit)
        untouched = server.run(None, TESTS[:1])
        print(f"the selection: {untouched.cpu:.1f} s of CPU, {untouched.seconds:.1f} s in all, {untouched.verdict}")
        if options.baseline or untouched.verdict != "survived":
            print("\n".join(server.slowest), untouched.test)
            return int(untouched.verdict != "survived")
        found = list(run_sample(options, server, log))
    if not options.only:
        write_results(options, found, untouched, origin)
    for mutant, outcome in found:
        if outcome.verdict == "survived":
            print(f"{mutant.file}:{mutant.line} {mutant.operator}\n  - {mutant.old}\n  + {mutant.new}")
            print(f"  {equivalence_reason(mutant)}")
    return 0


def draw_sample(options: Options, package: Path) -> Iterator[Mutant]:
    """The mutants, in an order that only the seed and the sources decide."""
    every = [(file, *place) for file in FILES for place in possible_changes(package / file)]
    random.Random(options.seed).shuffle(every)
    count = 0
    for file, operator, occurrence in every:
        if options.only in file and count < options.sample:
            mutant = Mutant.made(package / file, operator, occurrence)
            if mutant is not None:
                count += 1
                yield mutant


def run_sample(options: Options, server: ForkedTests, log: Path) -> Iterator[tuple[Mutant, Outcome]]:
    """Each mutant's outcome: from the log if this very file has run against these tests, else from the server."""
    digest = hashlib.sha1()
    for name in sorted((server.copy / "tests").glob("*.py")):
        digest.update(name.read_bytes() if name.name in TESTS else b"")
    known: dict[str, Outcome] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        entry = json.loads(line)
        known[entry["key"]] = Outcome(**entry["outcome"])
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("mutants", total=options.sample)
        for i, mutant in enumerate(draw_sample(options, server.copy / "trajsurgery")):
            key = f"{mutant.key} {digest.hexdigest()[:12]}"
            if key not in known:
                known[key] = server.run(mutant, RUN_FIRST.get(mutant.file, TESTS[:1]))
                with log.open("a") as file:
                    file.write(json.dumps({"key": key, "outcome": asdict(known[key])}) + "\n")
                if progress.disable:
                    print(f"{i + 1}/{options.sample} {mutant.file}:{mutant.line} {known[key].verdict}", flush=True)
            progress.advance(task)
            yield mutant, known[key]


def equivalence_reason(mutant: Mutant) -> str:
    """The reason why the mutant is the package, or nothing."""
    return EQUIVALENT.get((mutant.file, mutant.old, mutant.new), "")


def wilson_interval(share: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's score interval)."""
    p, n = share / of, of
    centre, width = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return (centre - width) / (1 + z**2 / n), (centre + width) / (1 + z**2 / n)


def write_results(
    options: Options, found: list[tuple[Mutant, Outcome]], untouched: Outcome, origin: dict[str, Any]
) -> None:
    """mutants.json and mutants.png."""
    verdicts = Counter(outcome.verdict for _, outcome in found)
    killed = len(found) - verdicts["survived"]
    equivalent = sum(outcome.verdict == "survived" and bool(equivalence_reason(mutant)) for mutant, outcome in found)
    low, high = wilson_interval(killed, len(found))
    record: dict[str, Any] = {
        "mutants": len(found),
        "killed": killed,
        "of these hanging": verdicts["hangs"],
        "survived": verdicts["survived"],
        "of these equivalent": equivalent,
        "share killed": round(killed / len(found), 4),
        "95% interval": [round(low, 4), round(high, 4)],
        "share killed of those that are not equivalent": round(killed / (len(found) - equivalent), 4),
        "seed": options.seed,
        "selection": {"tests": list(TESTS), "seconds of CPU": untouched.cpu, "Hypothesis profile": "mutants"},
        "seconds of CPU in all": round(sum(outcome.cpu for _, outcome in found), 1),
        "survivors": [
            {
                **{name: getattr(mutant, name) for name in ("file", "line", "operator", "old", "new")},
                "why": equivalence_reason(mutant),
            }
            for mutant, outcome in found
            if outcome.verdict == "survived"
        ],
        **origin,
    }
    record["versions"] |= {name: version(name) for name in ("cosmic-ray", "hypothesis", "pytest", "sympy")}
    (RESULTS / "mutants.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    draw_picture(found, f"{killed} of {len(found)} mutants killed ({100 * low:.1f}% to {100 * high:.1f}%)")


def draw_picture(found: list[tuple[Mutant, Outcome]], title: str) -> None:
    """Killed and survived, by file and by kind of change."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("file", "kind"), strict=True):
        names = sorted({getattr(mutant, kind) for mutant, _ in found}, reverse=True)
        dead = [sum(getattr(m, kind) == name and o.verdict != "survived" for m, o in found) for name in names]
        alive = [sum(getattr(m, kind) == name and o.verdict == "survived" for m, o in found) for name in names]
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


EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "surgery/autograd_functions.py",
        "@staticmethod",
        "",
    ): "torch calls a Function's methods on its class, where a plain function is alike.",
    ("plans/rules.py", "if len(set(times)) < len(times):", "if len(set(times)) != len(times):"): (
        "a set never has more members than the list that it is made of."
    ),
    (
        "plans/closed_form.py",
        "if isinstance(a, sympy.Add) and sympy.sympify(b).is_number:",
        "if isinstance(a, sympy.Add) or sympy.sympify(b).is_number:",
    ): "the factors are swapped in more cases, and their product is the same.",
    (
        "plans/closed_form.py",
        "found, count = found | more if found else more, count + self.below[parent]",
        "found, count = found ^ more if found else more, count + self.below[parent]",
    ): "the two sets have nothing in common there.",
    (
        "plans/closed_form.py",
        "if found & more:  # a call on two ways: they are merged, and may cancel",
        "if not found & more:  # a call on two ways: they are merged, and may cancel",
    ): "every node is then counted as one whose ways merge, which gives the same count in more time.",
    (
        "plans/derivatives.py",
        "ws = dict(zip(order, found, strict=True))",
        "ws = dict(zip(order, found, strict=False))",
    ): ("there are as many weights as supports."),
}
"""(file, line, changed line): why no test can see the change."""

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
