"""HPSv3's gradient, and a judge, on a small Qwen2-VL: transformers' classes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rewards.originals import record, small
from tests.rewards.test_originals import small_hpsv3
from tests.tolerances import STOCK
from trajsurgery import RewardError
from trajsurgery.rewards.hpsv3 import QUESTION
from trajsurgery.rewards.judge import Judge


def test_the_gradient_agrees_with_finite_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: the casts to float32 of Qwen2-VL and its norms are removed."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    reward = small_hpsv3(tmp_path).double()
    for kind in {type(module) for module in reward.modules() if hasattr(module, "variance_epsilon")}:
        monkeypatch.setattr(kind, "forward", norm)
    assert not any(p.requires_grad for p in reward.parameters())
    assert not any(module.training for module in reward.modules())
    generator = torch.Generator().manual_seed(0)
    pixels = 0.1 + 0.8 * torch.rand(1, 3, 70, 90, generator=generator, dtype=torch.float64)
    direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(reward(pixels.requires_grad_(), ["a cat"]).sum(), pixels)
    with torch.no_grad():
        ahead, back = (reward(pixels + sign * 1e-5 * direction, ["a cat"]).sum() for sign in (1, -1))
    analytic = float((gradient * direction).sum())
    assert abs(analytic - float(ahead - back) / 2e-5) <= STOCK * abs(analytic)


def test_a_judge_scores_by_generated_text(tmp_path: Path) -> None:
    small.qwen_tokenizer(tmp_path / "qwen", QUESTION)
    record.save_qwen(tmp_path / "qwen")
    judge = Judge(tmp_path / "qwen", answer=r"(?s)(.*)", length=4, dtype=torch.float32)
    picture = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    answer = judge.said(picture, "a cat")
    assert answer == judge.said(picture, "a cat")
    with pytest.raises(RewardError, match="unifiedreward answered without a score"):
        judge(picture[None], ["a cat"])
    judge.answer, judge.number = __import__("re").compile("(.)"), lambda answer: float(len(answer))  # type: ignore[method-assign]
    assert judge(picture[None], ["a cat"]).tolist() == [len(answer)]
    with pytest.raises(RewardError, match="can't be trained on"):
        judge(picture[None].requires_grad_(), ["a cat"])
