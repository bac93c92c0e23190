"""Hypothesis profiles, one torch thread, and fixtures that many tests share."""

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tests.builders.problems import Problem, problem
from trajsurgery.testing import MLP

torch.set_num_threads(1)

_SHARED = {
    "deadline": None,
    "phases": (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("dev", max_examples=25, **_SHARED)
settings.register_profile("ci", max_examples=200, derandomize=True, **_SHARED)
settings.register_profile(
    "mutants", settings.get_profile("ci"), max_examples=15, database=None, phases=(Phase.explicit, Phase.generate)
)
# By hand: `python -m tests.thorough`.
settings.register_profile("thorough", max_examples=5000, database=None, print_blob=True, **_SHARED)
settings.register_profile("mutation", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))


@pytest.fixture
def mlp() -> MLP:
    """A nonlinear field on latents [batch, 4]."""
    return MLP(4, seed=3)


@pytest.fixture
def rolled(mlp: MLP) -> Problem:
    """A rollout of `mlp`: eight steps, a batch of three."""
    return problem(mlp, steps=8)


@pytest.fixture
def script() -> Callable[[str], ModuleType]:
    """Import a module of benchmarks/ by its name there, such as "study.runs"."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")
