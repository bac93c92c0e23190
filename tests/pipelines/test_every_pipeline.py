"""Every pipeline of the table, unmodified: images bit for bit, the whole gradient, all ways of running."""

from __future__ import annotations

import pytest
import torch

from tests.pipelines.builders import BUILDERS
from tests.pipelines.checks import measured
from tests.tolerances import STOCK, VALUE


@pytest.mark.parametrize("name", BUILDERS)
def test_operate_keeps_its_promises(name: str) -> None:
    small = BUILDERS[name]()
    found = measured(small)
    assert found.exact
    assert found.reached, "the gradient reaches other tensors than plain backpropagation does"
    assert found.restored
    # transformers cast to float32 inside, and some pipelines run in float32 throughout
    tolerance = STOCK if small.pipe.transformer.dtype == torch.float64 else VALUE[torch.float32]
    assert found.by_hand < tolerance
    assert found.recompute < tolerance
    assert found.staged < tolerance
