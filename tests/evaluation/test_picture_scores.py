"""Rewards by name, and the command that scores pictures with them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.builders.toy_world import LikesRed
from trajsurgery import RewardError
from trajsurgery.cli import main
from trajsurgery.errors import RecipeError
from trajsurgery.evaluation import model_comparison
from trajsurgery.evaluation.picture_files import read_picture
from trajsurgery.evaluation.picture_scores import find_pictures, score_pictures
from trajsurgery.rewards import contract, packaged
from trajsurgery.rewards.loading import load_reward
from trajsurgery.rewards.mixtures import Relative, Weighted
from trajsurgery.training.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of different sizes and formats, and a text file."""
    for name, size, colour in (("b.png", (8, 5), "red"), ("a.jpg", (9, 9), "lime"), ("c.PNG", (1, 3), "blue")):
        Image.new("RGB", size, colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("green\nred\na blue one\n")
    return tmp_path


def test_every_packaged_name_says_what_to_download(tmp_path: Path) -> None:
    for name, entry in packaged.NAMES.items():
        assert packaged.is_packaged(name)
        with pytest.raises(RewardError, match=f"hf download {entry.repository}"):
            packaged.load_packaged(name)
        assert f"hf download {entry.repository}" in str(packaged.missing_weights(name))
        assert packaged.missing_weights(f"{name}:{tmp_path}") is None
        assert "there is no" in str(packaged.missing_weights(f"{name}:{tmp_path}/gone"))
    assert packaged.load_packaged("nothing") is None
    assert not packaged.is_packaged("nothing")
    assert not packaged.is_packaged("remote")
    assert packaged.is_packaged("remote:here:1")
    with pytest.raises(RewardError, match="HOST:PORT"):
        packaged.load_packaged("remote:here")
    assert packaged.is_packaged("hpsv2")
    with pytest.raises(RewardError, match=r"HPS_v2.1_compressed"):
        load_reward("hpsv2", CPU)
    with pytest.raises(RecipeError, match=r"pickscore.*remote:HOST:PORT"):
        load_reward("pikscore", CPU)


def test_packaged_names_are_those_of_the_rewards() -> None:
    from trajsurgery.rewards.clip import Aesthetic, CLIPScore, PickScore
    from trajsurgery.rewards.imagereward import ImageReward

    for kind in (PickScore, CLIPScore, Aesthetic, ImageReward):
        assert packaged.NAMES[kind.name].kind == kind.__name__
    assert Recipe().reward == "tiny"


def test_pictures_and_prompts_are_paired_by_name(folder: Path) -> None:
    pictures = find_pictures([folder], folder / "notes.txt")
    assert [(p.path.name, p.prompt) for p in pictures] == [
        ("a.jpg", "green"),
        ("b.png", "red"),
        ("c.PNG", "a blue one"),
    ]
    lines = [{"image": "c.PNG", "prompt": "third"}, {"image": "b.png", "prompt": "first"}]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    pictures = find_pictures([folder / "b.png", folder / "c.PNG"], folder / "p.jsonl")
    assert [(p.path.name, p.prompt) for p in pictures] == [("b.png", "first"), ("c.PNG", "third")]


def test_a_picture_is_read_unchanged(folder: Path) -> None:
    pixels = read_picture(folder / "b.png", CPU)
    assert pixels.shape == (1, 3, 5, 8)
    assert torch.equal(pixels.amax((2, 3)), torch.tensor([[1.0, 0.0, 0.0]]))
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(folder / "clear.png")
    assert read_picture(folder / "clear.png", CPU).shape == (1, 3, 4, 4)
    assert float(read_picture(folder / "clear.png", CPU).min()) == 1


def test_the_command_prints_and_saves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "tests.builders.toy_world:LikesRed"
    assert main(["score", str(folder), "--prompts", str(folder / "notes.txt"), "--reward", name]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((folder / "scores.json").read_text())
    rows = {Path(row["image"]).name: row for row in saved["images"]}
    assert rows["b.png"][name] == 1
    assert rows["b.png"]["prompt"] == "red"
    assert rows["c.PNG"][name] == 1  # the prompt asks for blue
    assert rows["a.jpg"][name] < -0.9
    values = [row[name] for row in saved["images"]]
    mean = sum(values) / 3
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)
    assert saved["rewards"][name]["mean"] == pytest.approx(mean)
    assert saved["rewards"][name]["standard_error"] == pytest.approx(error)
    assert f"{mean:.4f}" in printed
    assert "standard error" in printed


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: ["--prompts", f / "gone.txt"], "there is no file"),
        (lambda f: ["--reward", "hpsv2"], "hf download xswu/HPSv2"),
        (lambda f: ["--batch", "0"], "at least one picture"),
        (lambda f: [f / "gone.png"], r"there is no .*gone.png"),
        (lambda f: [f / "b.png"], "3 prompts for 4 images"),
        (lambda f: ["--prompts", f / "bad.jsonl"], r"line 1 is .*has no prompt"),
        (lambda f: ["--prompts", f / "few.jsonl"], r"no prompt for a.jpg and 1 further"),
        (lambda f: ["--prompts", f / "latin.txt"], "no text in UTF-8"),
    ],
)
def test_invalid_arguments_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], change: object, message: str
) -> None:
    (folder / "bad.jsonl").write_text('{"image": 3}\n')
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "few.jsonl").write_text('{"image": "b.png", "prompt": "x"}\n')
    arguments = change(folder)  # type: ignore[operator]
    options = {"--prompts": folder / "notes.txt", "--reward": "tests.builders.toy_world:LikesRed"}
    images = [folder, *(arguments if isinstance(arguments[0], Path) else [])]
    options |= {} if isinstance(arguments[0], Path) else {arguments[0]: arguments[1]}
    assert main(["score", *(str(word) for word in (*images, *(w for pair in options.items() for w in pair)))]) == 1
    assert re.search(message, " ".join(capsys.readouterr().out.split()))
    assert not (folder / "scores.json").exists()


def test_pictures_from_files_are_scored_as_bytes(folder: Path) -> None:
    """Every reward has `rounded` set, those in a mixture too; `evaluate` scores with the same function."""
    rounded = list[bool]()

    class RecordsRounded(contract.Reward):
        name = scale = source = licence = "tells"

        def score(self, images: Tensor, prompts: list[str]) -> Tensor:
            rounded.append(self.rounded)
            return images.mean((1, 2, 3))

    pictures = find_pictures([folder], folder / "notes.txt")
    score_pictures(
        Weighted([(RecordsRounded(), 1.0), (Relative(RecordsRounded(), "good", "bad", 0.5), 1.0)]), pictures, CPU
    )
    assert rounded == [True] * 9
    assert model_comparison.score_pictures is score_pictures


def test_pictures_of_one_size_are_scored_in_batches_and_each_once(folder: Path) -> None:
    for name, size in (("d.png", (8, 5)), ("e.png", (8, 5)), ("f.png", (8, 5))):
        Image.new("RGB", size, "red").save(folder / name)
    (folder / "six.txt").write_text("x\n" * 6)
    batches, progress = list[int](), list[int]()

    class RecordsBatches(LikesRed):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            batches.append(len(images))
            return super().__call__(images, prompts)

    pictures = find_pictures([folder], folder / "six.txt")
    assert score_pictures(RecordsBatches(), pictures, CPU, 2, progress.append) == score_pictures(
        LikesRed(), pictures, CPU
    )
    assert batches == progress == [1, 1, 1, 2, 1]


def test_a_file_that_is_no_picture_is_refused(folder: Path) -> None:
    (folder / "z.png").write_text("not a picture")
    with pytest.raises(RewardError, match="no picture that PIL can read"):
        read_picture(folder / "z.png", CPU)


def test_a_single_picture_has_no_standard_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one.txt").write_text("red\n")
    name = "tests.builders.toy_world:LikesRed"
    words = ["score", str(folder / "b.png"), "--prompts", str(folder / "one.txt"), "--reward", name]
    assert main([*words, "--output", str(folder / "one.json")]) == 0
    assert json.loads((folder / "one.json").read_text())["rewards"][name]["standard_error"] is None
    assert "nan" not in capsys.readouterr().out
    score: Tensor = LikesRed()(torch.ones(1, 3, 2, 2), ["x"])
    assert float(score) == 0


def test_prompt_files_of_other_formats_name_the_pictures_too(folder: Path) -> None:
    rows = [{"image": "b.png", "caption": "first"}, {"image": "c.PNG", "caption": "second"}]
    (folder / "p.json").write_text(json.dumps(rows))
    pictures = find_pictures([folder / "c.PNG", folder / "b.png"], folder / "p.json")
    assert [p.prompt for p in pictures] == ["second", "first"]


QUICK = """
import sys
from trajsurgery.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(stop.code, [m for m in ("torch", "diffusers", "transformers") if m in sys.modules])
"""


@pytest.mark.parametrize("words", [["--help"], ["score", "--help"], ["evaluate", "--help"]], ids=len)
def test_help_imports_no_torch(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", QUICK, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert words[0] in done.stdout


def test_the_installed_command_is_main() -> None:
    (command,) = entry_points(group="console_scripts", name="trajsurgery")
    assert command.load() is main


@pytest.mark.parametrize("module", ["trajsurgery"])
def test_the_package_runs_as_the_command(module: str) -> None:
    words = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "Score pictures with rewards" in done.stdout


def red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def make_red() -> object:
    return red


class Red(nn.Module):
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return red(images, prompts)


class Weighs(Red):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


RED, RED_MODULE = red, Red()


@pytest.mark.parametrize("name", ["red", "make_red", "RED", "Red", "RED_MODULE"])
def test_a_module_name_is_a_reward_or_its_factory(name: str) -> None:
    reward = load_reward(f"{__name__}:{name}", CPU)
    assert torch.equal(reward(torch.ones(1, 3, 2, 2), ["a circle"]), torch.ones(1))


@pytest.mark.parametrize("name", ["tiny", f"{__name__}:Weighs", "0.5*tiny"])
def test_a_reward_that_is_a_module_moves_to_the_device(name: str) -> None:
    reward = load_reward(name, torch.device("meta"))
    assert isinstance(reward, nn.Module)
    assert all(p.is_meta for p in reward.parameters())
