"""The closed forms in the table of recipes/README.md are those that `plan.gradient()` derives."""

from collections.abc import Callable
from pathlib import Path

from trajsurgery import (
    Plan,
    draft_k,
    draft_lv,
    drtune,
    flowbp_bridge,
    flowbp_lagrange,
    flowbp_sparse,
    leapalign,
    leaps,
    methods,
    refl,
    reno,
    srpo,
    whole_trajectory,
)

TABLE = Path(__file__).parents[2] / "recipes/README.md"

INSTANCES: dict[str, tuple[str, Callable[[], Plan]]] = {
    "ReFL": ('refl("t")', lambda: refl("t")),
    "DRaFT-1": ("draft_k(1)", lambda: draft_k(1)),
    "DRaFT-K, AlignProp": ("draft_k(2)", lambda: draft_k(2)),
    "whole trajectory": ("whole_trajectory(3)", lambda: whole_trajectory(3)),
    "DRaFT-LV": ("draft_lv(1)", lambda: draft_lv(1)),
    "DRTune": ("drtune(25, 8, {22, 10})", lambda: drtune(25, 8, {22, 10})),
    "LeapAlign": ('leapalign("k", "j", "alpha")', lambda: leapalign("k", "j", "alpha")),
    "LeapAlign, one leap": ('leaps(("k",))', lambda: leaps(("k",))),
    "LeapAlign, three": ('leaps(("l", "k", "j"), "alpha")', lambda: leaps(("l", "k", "j"), "alpha")),
    "LeapAlign, Eq. 14": (
        'leaps(("k", "j"), "alpha", straight=False)',
        lambda: leaps(("k", "j"), "alpha", straight=False),
    ),
    "LeapAlign, reward at the prediction": (
        'leaps(("k", "j"), "alpha", "prediction")',
        lambda: leaps(("k", "j"), "alpha", "prediction"),
    ),
    "FlowBP-Sparse": ("flowbp_sparse(4, {3, 1})", lambda: flowbp_sparse(4, {3, 1})),
    "FlowBP-Bridge": ('flowbp_bridge(4, 2, {3}, "alpha")', lambda: flowbp_bridge(4, 2, {3}, "alpha")),
    "FlowBP-Lagrange": (
        'flowbp_lagrange(3, 1, "alpha", "a", rescale=0)',
        lambda: flowbp_lagrange(3, 1, "alpha", "a", rescale=0),
    ),
    "SRPO": ('srpo("k", "j")', lambda: srpo("k", "j")),
    "SRPO, inversion": ('srpo("j", "k")', lambda: srpo("j", "k")),
    "ReNO": ("reno()", lambda: reno()),
}


def row(name: str) -> str:
    """The line of the table."""
    code, plan = INSTANCES[name]
    # a bar would end the cell
    return f"| {name} | `{code}` | {'<br>'.join(f'`{line}`' for line in str(plan().gradient()).splitlines())} |"


def test_every_closed_form_of_the_table_is_derived() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ") and "dtheta" in line]
    assert rows == [row(name) for name in INSTANCES]


def test_the_code_of_the_table_makes_the_plan() -> None:
    for code, plan in INSTANCES.values():
        assert eval(code, dict(vars(methods))) == plan(), code


def test_every_function_of_times_is_in_the_table() -> None:
    functions = {name for name, value in vars(methods).items() if callable(value) and name.islower()}
    assert functions == {code.partition("(")[0] for code, _ in INSTANCES.values()}


if __name__ == "__main__":
    print("\n".join(map(row, INSTANCES)))
