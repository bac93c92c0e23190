"""Plans of a thousand nodes are fast; the language imports no heavy module."""

import pickle
import subprocess
import sys
import time

import pytest

from trajsurgery import Plan, latent, leapalign

HEAVY = {"torch", "networkx", "sympy", "matplotlib", "diffusers"}


def long_plan(steps: int) -> Plan:
    """Full backpropagation: a leap and a discount a step."""
    x = latent(steps)
    for t in range(steps, 0, -1):
        x = x.leap(t - 1, discount=0.5)
    return Plan(x)


def wide_plan(doublings: int) -> Plan:
    """A plan whose expression, written out as a tree, has 2^doublings leaves."""
    x = latent(doublings + 1)
    for t in range(doublings + 1, 1, -1):
        x = x.advance(t - 1, [x.velocity(), x.detach().velocity("other")][:1]).connect()
    return Plan(x.leap(0))


@pytest.mark.parametrize("plan, nodes", [(lambda: long_plan(334), 1003), (lambda: wide_plan(334), 1005)])
def test_a_thousand_nodes_are_fast(plan, nodes):
    start = time.perf_counter()
    made = plan()
    assert len(made.nodes) == nodes
    assert Plan.from_dict(made.to_dict()) == made
    assert pickle.loads(pickle.dumps(made)) == made
    assert len(str(made)) > nodes
    assert "nodes" in repr(made)
    made.prepared(400)
    assert len(made.graph) == nodes
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("module, free", [("nodes", HEAVY), ("rules", HEAVY), ("legality", HEAVY), ("plan", HEAVY)])
def test_the_language_imports_no_heavy_module(module, free):
    code = f"import sys, trajsurgery.plans.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not free & set(loaded)


def test_importing_the_package_is_light():
    code = "import sys, trajsurgery; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_plans_hold_no_tensors():
    assert "tensor" not in str(leapalign(5, 2).to_dict())
