"""`--rollout.compile`: torch.compile of the transformer's forward, under `operate` and in what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import toy_world
from trajsurgery import leapalign, operate
from trajsurgery.training.components import prepare_pipeline

CALL: dict[str, Any] = {"prompt": ["a circle", "a blue square"], "height": 16, "width": 16, "num_inference_steps": 2,
                        "output_type": "pt"}  # fmt: skip


def images(pipe: Any) -> torch.Tensor:
    return pipe(**CALL, generator=torch.Generator().manual_seed(3)).images


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_values_are_the_compiled_plain_calls_and_the_gradient_is_the_eager_ones(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = toy_world.recipe(tmp_path)
    eager, compiled = (
        prepare_pipeline(toy_world.pipeline(), replace(recipe, rollout=replace(recipe.rollout, compile=on)))
        for on in (False, True)
    )
    assert list(compiled.transformer.state_dict()) == list(eager.transformer.state_dict())
    found: list[list[torch.Tensor]] = []
    for pipe in (eager, compiled):
        plain = images(pipe)
        with operate(pipe, leapalign(2, 1)):
            operated = images(pipe)
        assert torch.equal(operated, plain)
        operated.square().sum().backward()
        found.append([p.grad for p in pipe.transformer.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm()) <= 1e-3 * float(a.norm())
    assert torch._dynamo.utils.counters["frames"]["ok"]  # something was compiled
