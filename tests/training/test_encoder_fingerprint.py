"""What determines an encoding changes the fingerprint, and nothing else does; any changed word changes a checksum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import toy_world
from trajsurgery.training.encodings.encoder_fingerprint import checksum, fingerprint


def other_weight(pipe: Any) -> None:
    with torch.no_grad():
        pipe.text_encoder_2.get_input_embeddings().weight[-1, -1] += 1e-6


def other_dtype(pipe: Any) -> None:
    pipe.text_encoder.double()


def other_kernel(pipe: Any) -> None:
    pipe.text_encoder.config._attn_implementation = "eager"


def other_vocabulary(pipe: Any) -> None:
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)  # all toy pipelines share it
    pipe.tokenizer.add_tokens(["a new word"])


def other_setting(pipe: Any) -> None:
    pipe.tokenizer_max_length -= 1


def other_class(pipe: Any) -> None:
    pipe.__class__ = type("Derived", (type(pipe),), {})


@pytest.mark.parametrize(
    "change", [other_weight, other_dtype, other_kernel, other_vocabulary, other_setting, other_class]
)
def test_what_makes_other_encodings_has_another_fingerprint(change: Callable[[Any], None]) -> None:
    pipe, other = toy_world.pipeline(), toy_world.pipeline()
    before = fingerprint(pipe)
    other.encode_prompt(["a circle"] * 2, None)  # which leaves its padding in the tokenizers
    assert fingerprint(other) == before
    change(pipe)
    assert fingerprint(pipe) != before


def test_a_pipeline_that_was_moved_has_its_fingerprint(tmp_path: Path) -> None:
    prints = set[str]()
    toy_world.pipeline().save_pretrained(tmp_path / "one")
    for place in ("one", "two"):
        prints.add(fingerprint(type(toy_world.pipeline()).from_pretrained(tmp_path / place)))
        if place == "one":
            (tmp_path / "one").rename(tmp_path / "two")
    assert len(prints) == 1


@pytest.mark.parametrize("shape", [(), (1,), (3,), (8,), (2**20 + 5,), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_any_changed_word_changes_the_checksum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    before = checksum(tensor)
    assert torch.equal(checksum(tensor.clone()), before)
    for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
        changed = tensor.clone()
        changed.view(-1)[place] = 0
        assert not torch.equal(checksum(changed), before)
    swapped = torch.tensor([1.0, 2, 3, 4])
    assert not torch.equal(checksum(swapped), checksum(swapped[[2, 3, 0, 1]]))
    assert torch.equal(checksum(swapped.repeat(2)[1:5]), checksum(swapped[[1, 2, 3, 0]]))
