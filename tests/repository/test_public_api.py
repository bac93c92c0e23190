"""The public API is what its snapshot says; names that change keep working for one minor version."""

from __future__ import annotations

from typing import Any

import pytest
from packaging.version import Version

import trajsurgery
from tests.repository.public_api import MODULES, SNAPSHOT, api


def test_the_public_api_is_the_snapshot_s() -> None:
    assert api() == SNAPSHOT.read_text(), (
        "the public API has changed: if that is meant, write it into CHANGELOG.md, keep former names working "
        "(trajsurgery._RENAMED), and run `python -m tests.repository.public_api`"
    )


def test_every_public_name_is_there() -> None:
    for name in trajsurgery.__all__:
        assert getattr(trajsurgery, name) is not None
    assert {name for module in MODULES for name in MODULES[module]}


def test_a_renamed_name_works_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trajsurgery._RENAMED, "leap_align", ("leapalign", "0.3"))
    with pytest.warns(DeprecationWarning, match=r"trajsurgery\.leap_align is now trajsurgery\.leapalign.*until 0\.3"):
        former: Any = trajsurgery.leap_align  # pyright: ignore[reportAttributeAccessIssue]
    assert former is trajsurgery.leapalign


def test_no_former_name_is_kept_too_long() -> None:
    """A warning for one minor version: what was to go by now is gone."""
    now = Version(trajsurgery.__version__)
    for name, (_, last) in trajsurgery._RENAMED.items():
        assert now < Version(last), f"{name} was to go in {last}"
