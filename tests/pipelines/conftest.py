"""Ignore the warnings that diffusers' pipelines raise under the newest torch and numpy."""

from pathlib import Path

import pytest

_DIFFUSERS_WARNINGS = (
    "ignore:.*is deprecated:FutureWarning",  # names that its modules are to drop
    "ignore:In CPU autocast:UserWarning",  # Mochi asks for autocast to float32
    "ignore:Mismatch dtype between input and weight:UserWarning",  # Krea 2 norms in float32, its weights are float64
    "ignore:__array__ implementation:DeprecationWarning",  # DPM-Solver hands tensors to numpy
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore these warnings in the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in _DIFFUSERS_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
