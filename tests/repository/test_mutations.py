"""The mutations of `mutations.py` still fit the library, and tests/README.md shows what each one breaks."""

from pathlib import Path

import pytest

from tests.builders.mutations import MUTATIONS

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_mutation_applies_and_is_recorded(mutation):
    for name, old, new in ((mutation.file, mutation.old, mutation.new), *mutation.also):
        text = (TESTS.parent / "trajsurgery" / name).read_text()
        assert text.count(old) == 1
        compile(text.replace(old, new), name, "exec")
    (row,) = [line for line in (TESTS / "README.md").read_text().splitlines() if f"| {mutation.what} |" in line]
    test = row.split("|")[3].strip().strip("`").partition("[")[0]
    file, _, name = test.partition("::")
    assert file == mutation.test.partition("::")[0]
    assert f"def {name}(" in (TESTS / file).read_text()
