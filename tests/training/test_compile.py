"""`--rollout.compile`: torch.compile of the transformer's forward, under `operate` and in its state dict."""

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
def test_images_are_those_of_the_compiled_call_and_gradients_those_of_the_eager_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = toy_world.recipe(tmp_path)
    eager, compiled = (
        prepare_pipeline(toy_world.pipeline(), replace(recipe, rollout=replace(recipe.rollout, compile=on)))
        for on in (False, True)
    )
    assert list(compiled.transformer.state_dict()) == list(eager.transformer.state_dict())
    gradients: list[list[torch.Tensor]] = []
    for pipe in (eager, compiled):
        plain = images(pipe)
        with operate(pipe, leapalign(2, 1)):
            operated = images(pipe)
        assert torch.equal(operated, plain)
        operated.square().sum().backward()
        gradients.append([p.grad for p in pipe.transformer.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= 1e-3 * float(a.norm())
    assert torch._dynamo.utils.counters["frames"]["ok"]  # something was compiled
