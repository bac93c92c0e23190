"""Mutants of a file by cosmic-ray's operators, one by one."""

from __future__ import annotations

import ast
import difflib
import hashlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

try:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider
except ImportError:
    sys.exit("benchmarks/engine/mutants.py needs cosmic-ray, whose operators make the mutants: pip install cosmic-ray")

PROVIDER = OperatorProvider()
OPERATORS = [name for name in PROVIDER if not PROVIDER[name].arguments()]
"""The operators that need no variable names as arguments."""


@dataclass(frozen=True)
class Mutant:
    """A file of the package with one change."""

    file: str
    """Its path below the package."""
    operator: str
    occurrence: int
    line: int
    old: str
    """The line before the change, without indentation."""
    new: str
    text: str = field(repr=False)
    """The whole changed file."""

    @classmethod
    def create(cls, package: Path, file: str, operator: str, occurrence: int) -> Mutant | None:
        """Return the mutant, or None if it does not compile or differs in annotations only."""
        before = (package / file).read_text()
        after = mutate_code(before, PROVIDER[operator](), occurrence)
        if after is None or _syntax_without_annotations(after) in (None, _syntax_without_annotations(before)):
            return None
        lines = before.splitlines(), after.splitlines()
        for tag, i, end, j, last in difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes():
            if tag != "equal":
                old, new = (" ".join(part).strip() for part in (lines[0][i:end], lines[1][j:last]))
                return cls(file, operator, occurrence, i + 1, old, new, after)
        return None

    @property
    def key(self) -> str:
        """An identifier that does not depend on how mutants are numbered."""
        return f"{self.file} {hashlib.sha1(self.text.encode()).hexdigest()[:16]}"

    @property
    def kind(self) -> str:
        """The family of the operator."""
        for start, name in KINDS.items():
            if self.operator.startswith(start):
                return name
        return "other"


KINDS = {
    "ReplaceBinaryOperator": "arithmetic",
    "ReplaceComparisonOperator": "comparison",
    "ReplaceUnaryOperator": "sign, not",
    "AddNot": "sign, not",
    "NumberReplacer": "number",
    "ReplaceTrue": "boolean",
    "ReplaceFalse": "boolean",
    "ReplaceAnd": "boolean",
    "ReplaceOr": "boolean",
    "RemoveDecorator": "decorator",
    "ZeroIteration": "loop",
    "ReplaceBreak": "loop",
    "ReplaceContinue": "loop",
}
"""Families of operators, by the beginning of cosmic-ray's names."""


def possible_changes(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (operator, occurrence) of every change that cosmic-ray can make to a file."""
    nodes = list(ast_nodes(get_ast(path.read_text())))
    for name in OPERATORS:
        operator: Any = PROVIDER[name]()
        count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        yield from ((name, i) for i in range(count))


@cache
def _syntax_without_annotations(text: str) -> str | None:
    """Return the syntax tree without annotations, which are not evaluated; None if it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
            compile(text, "mutant", "exec")
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)
