"""Encoded prompts on disk: bit for bit the pipeline's own, written once by all ranks, read mapped by later runs."""

from __future__ import annotations

import functools
import json
import os
import resource
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from tests.builders import toy_world
from tests.training.test_prompt_cache import flux, sana, sd3_with_three_encoders
from tests.training.test_ranks import check_same_run, exact_world, run_whole, spawn
from trajsurgery import RecipeError
from trajsurgery.cli import train_command
from trajsurgery.training.distributed import ranks
from trajsurgery.training.encodings.encoding_folder import EncodingFolder, remove_unused
from trajsurgery.training.encodings.prompt_cache import PromptCache, free_text_encoders, open_folder
from trajsurgery.training.recipe import Recipe

TEXTS = ("a circle", "a red circle left of a blue square", "two squares")


def cached(build: Any, folder: Path, texts: Any = TEXTS) -> tuple[Any, PromptCache, dict[str, Any], list[int]]:
    """A new pipeline whose prompts lie in a folder and whose encoders are gone; how often they ran."""
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    runs = list[int]()
    for name in (n for n in pipe.components if "text_encoder" in n and getattr(pipe, n) is not None):
        getattr(pipe, name).register_forward_hook(lambda *_: runs.append(1))
    open_folder(pipe, folder, 1)
    embeddings = PromptCache(pipe, texts, call)
    assert free_text_encoders(pipe)
    return pipe, embeddings, call, runs


def encoded(pipe: Any, arguments: dict[str, Any], call: dict[str, Any]) -> list[Tensor]:
    """What the transformer is called with, but for the latents and the time."""
    inputs = list[Tensor]()

    def record(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask", "txt_ids")
        inputs.extend(kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor))

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    pipe(
        **{**call, **arguments}, num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(3)
    )
    handle.remove()
    return inputs


@pytest.mark.parametrize("build", [flux, sd3_with_three_encoders, sana])
def test_entries_are_the_pipeline_s_own_and_a_later_run_encodes_nothing(build: Any, tmp_path: Path) -> None:
    first, later = cached(build, tmp_path), cached(build, tmp_path)
    assert first[3]
    assert not later[3]
    plain, call = build()
    plain.set_progress_bar_config(disable=True)
    for pipe, embeddings, *_ in (first, later):
        for text in TEXTS:
            arguments = embeddings([text])
            expected, mine = encoded(plain, arguments, call), encoded(pipe, arguments, call)
            assert len(mine) >= 2
            assert all(map(torch.equal, mine, expected))
    if build is flux:  # others call the transformer with each prompt twice, for guidance
        alone = [encoded(later[0], later[1]([text]), call)[0] for text in TEXTS]
        assert torch.equal(encoded(later[0], later[1](TEXTS), call)[0], torch.cat(alone))


class PadsToLongest(FluxPipeline):
    """Encodes to the longest prompt of a batch, with a mask only where one is padded, and rounds as its batch is."""

    def encode_prompt(self, prompt: list[str], device: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        sizes = [len(text.split()) for text in prompt]
        states = self._get_t5_prompt_embeds(prompt, max_sequence_length=16)[:, : max(sizes)]
        mask = torch.tensor([[i < size for i in range(max(sizes))] for size in sizes])
        states = torch.where(mask[..., None], states * (1 + len(prompt) / 100), 0)
        return states, None if mask.all() else mask.long()

    def __call__(self, prompt: Any, **_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.transformer(*self.encode_prompt(prompt))


def test_an_entry_does_not_depend_on_its_batch_and_masks_come_back_where_prompts_are_padded(tmp_path: Path) -> None:
    def build() -> tuple[Any, dict[str, Any]]:
        return PadsToLongest(**toy_world.pipeline().components), {}

    cached(build, tmp_path)
    pipe, *_, runs = cached(build, tmp_path)
    assert not runs
    plain, sizes = build()[0], [len(text.split()) for text in TEXTS]
    states, mask = pipe.encode_prompt(list(TEXTS))
    assert mask.tolist() == [[int(i < size) for i in range(max(sizes))] for size in sizes]
    for text, row, size in zip(TEXTS, states, sizes, strict=True):
        with torch.no_grad():  # attention has another kernel, which rounds otherwise
            assert torch.equal(row[:size], plain.encode_prompt([text])[0][0])
        assert not row[size:].any()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_facts(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"text_encoder_2", b"text_encoder_9"))


@pytest.mark.parametrize("damage", [shorten, empty, flip_last_bit, change_facts])
def test_damaged_entries_are_encoded_anew(damage: Callable[[Path], None], tmp_path: Path) -> None:
    cached(flux, tmp_path)
    entries = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(entries) == len(TEXTS) + 1  # and the probe
    for path in entries:
        damage(path)
        assert path.read_bytes() != entries[path]
    runs = cached(flux, tmp_path)[3]
    assert runs
    assert {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == entries


def test_an_entry_that_goes_while_a_run_trains_is_an_error_that_says_where(tmp_path: Path) -> None:
    pipe, embeddings, call, _ = cached(flux, tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(RecipeError, match=f"have been let go, and {tmp_path} holds no encoding of it"):
        pipe(**embeddings(TEXTS[:1]), **call)


@contextmanager
def small_files(size: int) -> Generator[None]:
    """The operating system writes no file that is longer than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_stops_the_run_before_its_first_image(tmp_path: Path) -> None:
    pipe, call = flux()
    open_folder(pipe, tmp_path, 1)
    with small_files(1000), pytest.raises(RecipeError, match=r"can't be written .*File too large.*--prompt-cache none"):
        PromptCache(pipe, TEXTS, call)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"file: File exists"):
        open_folder(toy_world.pipeline(), tmp_path / "file", 1)
    folder = EncodingFolder(tmp_path, "")
    folder.write(["a"], {"0": torch.ones(9)}, {})
    folder.check_room(1, [["a"]])
    with pytest.raises(RecipeError, match=r"1000000000000 prompts take \d+\.\d GiB"):
        folder.check_room(10**12, [["a"]])


def test_what_was_unused_longest_is_removed_unless_a_run_uses_the_folder(tmp_path: Path) -> None:
    folder = EncodingFolder(tmp_path, "")
    for i, name in enumerate("abc"):
        folder.write([name], {"0": torch.ones(1000)}, {})
        os.utime(folder.path([name]), (i, i))
    (tmp_path / "x.partial").write_text("of a killed run")
    assert folder.is_whole("a")  # which is used now
    two = 2.5 * folder.path("a").stat().st_size / 2**30
    other = EncodingFolder(tmp_path, "", two)
    assert all(folder.exists(name) for name in "abc")
    del folder, other
    folder = EncodingFolder(tmp_path, "", two)
    assert [folder.exists(name) for name in "abc"] == [True, False, True]
    assert not list(tmp_path.glob("*.partial"))
    remove_unused(tmp_path, 0)
    assert not any(folder.exists(name) for name in "abc")


def anonymous_memory() -> int:
    """Bytes of this process that are no page cache."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_entries_are_read_from_the_page_cache(tmp_path: Path) -> None:
    folder, size, count = EncodingFolder(tmp_path, ""), 2**20, 48
    for i in range(count):
        folder.write([str(i)], {"0": torch.full((size,), i, dtype=torch.uint8)}, {})
    before = anonymous_memory()
    entries = [folder.read([str(i)], check=True) for i in range(count)]
    assert [int(entry[0]["0"].max()) for entry in entries if entry] == list(range(count))
    assert anonymous_memory() - before < count * size / 3


def recipe_with_folder(folder: Path, name: str, **changes: Any) -> Recipe:
    return toy_world.recipe(folder / name, iterations=2, prompt_cache=str(folder / "prompts"), **changes)


def test_a_run_writes_its_prompts_and_the_next_one_encodes_none(tmp_path: Path) -> None:
    counts = list[int]()
    for name in ("one", "two"):
        recipe = recipe_with_folder(tmp_path, name)
        world, runs = toy_world.world(recipe), list[int]()
        world.pipe.text_encoder.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        assert train_command.main(recipe, world) is not None
        assert world.pipe.text_encoder is None
        counts.append(len(runs))
    assert counts[0] > 0
    assert counts[1] == 0
    assert recipe.prompt_folder == tmp_path / "prompts"
    assert replace(recipe, prompt_cache="auto").prompt_folder is None  # embedded models encode in no time
    assert replace(recipe, prompt_cache="auto", model="m").prompt_folder == tmp_path / "prompt-cache"
    assert replace(recipe, prompt_cache="none", model="m").prompt_folder is None


def run_and_count(folder: Path) -> None:
    def world(recipe: Recipe) -> Any:
        parts = exact_world(recipe)
        method = type(parts.pipe).encode_prompt

        @functools.wraps(method)
        def counted(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            texts.extend([prompt] if isinstance(prompt, str) else prompt)
            return method(self, prompt, *args, **kwargs)

        parts.pipe.__class__ = type("Counted", (type(parts.pipe),), {"encode_prompt": counted})
        return parts

    for name in ("two", "later"):
        texts = list[str]()
        run_whole(folder / name, "ddp", 3, world, prompt_cache=str(folder / "prompts"))
        (folder / f"{name}-{ranks.rank()}.json").write_text(json.dumps(texts))


def test_two_ranks_encode_each_prompt_once_and_run_as_one_process_does(tmp_path: Path) -> None:
    run_whole(tmp_path / "one", "ddp", 3)
    spawn(2, run_and_count, tmp_path)
    by_rank = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2)]
    of_run = [[text for text in texts if text in toy_world.TEXTS] for texts in by_rank]
    assert sorted(of_run[0] + of_run[1]) == sorted(toy_world.TEXTS)
    assert all(of_run)
    assert [json.loads((tmp_path / f"later-{rank}.json").read_text()) for rank in range(2)] == [[], []]
    for name in ("two", "later"):
        check_same_run(tmp_path / "one", tmp_path / name)
