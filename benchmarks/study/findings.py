"""The paper's findings, tested on the study's runs: each with its intervals and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.seed_statistics import NAMED, Interval, Runs, gain, group_difference

EARLY, LATE = ("leapalign", "drtune"), ("refl", "draft_lv")


@dataclass(frozen=True)
class Finding:
    """A claim that differences are above 0, and the differences."""

    claim: str
    differences: Mapping[str, Interval]
    """What is compared: its interval over seeds."""
    strict: bool = True
    """True for "above"; False for "at or above", which only an interval below 0 contradicts."""

    @property
    def verdict(self) -> str:
        """What the intervals say about the claim as a whole."""
        verdicts = [difference.verdict for difference in self.differences.values()]
        if all(one == "above 0" for one in verdicts):
            return "reappears"
        if "below 0" in verdicts:
            contradicting, supporting = (
                [w for w, s in zip(self.differences, verdicts) if s == v] for v in ("below 0", "above 0")
            )
            verdict = f"does not reappear: the opposite for {', '.join(contradicting)}"
            return verdict + (f"; above 0 for {', '.join(supporting)}" if supporting else "")
        if not self.strict:
            return "not contradicted: no interval lies below 0"
        supporting = [what for what, one in zip(self.differences, verdicts) if one == "above 0"]
        return (
            f"in part: {', '.join(supporting)}; the rest is not decided" if supporting else "not decided by these seeds"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict (JSON)."""
        differences = {what: difference.to_dict() for what, difference in self.differences.items()}
        return {"claim": self.claim, "verdict": self.verdict, "differences": differences}

    def markdown(self) -> str:
        """Return a line for the claim, and one for each difference."""
        lines = [f"- {self.claim} **{self.verdict[0].upper()}{self.verdict[1:]}.**"]
        lines += [f"    - {what}: {difference}" for what, difference in self.differences.items()]
        return "\n".join(lines)


def table_2_findings(runs: Runs, seeds: Sequence[int], names: Sequence[str]) -> list[Finding]:
    """Return the findings of Table 2 and Fig. 5 whose methods were run."""
    tuned, findings = [name for name in names if name != "base"], list[Finding]()
    findings.append(
        Finding(
            "Every method raises the reward that it climbs (Table 2).",
            {name: gain(runs, seeds, name, "reward") for name in tuned},
        )
    )
    if "leapalign" in tuned:
        others = [name for name in tuned if name != "leapalign"]
        findings.append(
            Finding(
                "LeapAlign is first in reward at equal iterations (Table 2).",
                {f"leapalign - {name}": gain(runs, seeds, "leapalign", "reward", name) for name in others},
            )
        )
        held_out_figures = [figure for figure in NAMED if figure != "reward"]
        findings.append(
            Finding(
                "What LeapAlign gains is seen by scorers and rules that it does not climb (Table 2).",
                {NAMED[figure]: gain(runs, seeds, "leapalign", figure) for figure in held_out_figures},
            )
        )
    if {*EARLY, *LATE} <= set(tuned):
        figures = ("reward", "rules", "position", "attribute binding")
        findings.append(
            Finding(
                "Methods that reach early steps (LeapAlign, DRTune) are ahead of those that do not (ReFL, DRaFT-LV), "
                "also on position and attribute binding (section 6.2, Fig. 5).",
                {figure: group_difference(runs, seeds, EARLY, LATE, figure) for figure in figures},
            )
        )
    return findings
