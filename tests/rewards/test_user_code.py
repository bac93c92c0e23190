"""Users' own rewards by name: MODULE:NAME in the working folder, FILE.py:NAME anywhere, and their errors."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from trajsurgery import RecipeError
from trajsurgery.rewards.loading import load_reward, reward_problem
from trajsurgery.rewards.user_code import import_named

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SLOW_TO_IMPORT = ["torchvision", "sympy", "matplotlib", "diffusers", "transformers", "peft", "open_clip", "networkx"]
IMAGES = torch.linspace(0, 1, 24).reshape(2, 3, 2, 2)

SOURCE = """from __future__ import annotations
from dataclasses import dataclass
import torch
from own_scale import SCALE

def bright(images, prompts):
    return SCALE * images.mean((1, 2, 3))

@dataclass
class Bright:
    scale: float = SCALE
    threshold: float | None = 0.5

    def __call__(self, images, prompts):
        return self.scale * images.mean((1, 2, 3))

class Module(torch.nn.Module):
    def forward(self, images, prompts):
        return SCALE * images.mean((1, 2, 3))

instance = Bright()

def make(scale: float = SCALE):
    return Bright(scale)

number = 3.0

class NeedsAFolder:
    def __init__(self, folder):
        self.folder = folder

class Faulty:
    def __init__(self):
        open("gone.bin")
"""


NOWHERE = r"ModuleNotFoundError: No module named 'nowhere' \(.*own_missing.py, line 2\)"


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that is not on the path, with a reward and a module that it imports."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_reward.py").write_text(SOURCE)
    (tmp_path / "own_scale.py").write_text("SCALE = 2.0\n")
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("own_", str(tmp_path)))]:
        del sys.modules[name]


@pytest.mark.parametrize("place", ["own_reward", "own_reward.py", "./own_reward.py", "{folder}/own_reward.py"])
@pytest.mark.parametrize("name", ["bright", "Bright", "Module", "instance", "make"])
def test_a_class_an_instance_and_a_function_will_do(working_folder: Path, place: str, name: str) -> None:
    reference = f"{place.format(folder=working_folder)}:{name}"
    assert reward_problem(reference) is None
    scores = load_reward(reference, CPU)(IMAGES, ["a", "b"])
    torch.testing.assert_close(scores, 2 * IMAGES.mean((1, 2, 3)))
    other = f"{place.format(folder=working_folder)}:{'bright' if name != 'bright' else 'make'}"
    mixture = load_reward(f"0.5*{reference}+0.25*{other}", CPU)
    torch.testing.assert_close(mixture(IMAGES, ["a", "b"]), 1.5 * IMAGES.mean((1, 2, 3)))


def test_a_file_elsewhere_imports_its_neighbours(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (working_folder / "elsewhere").mkdir()
    monkeypatch.chdir(working_folder / "elsewhere")
    assert import_named("../own_reward.py:bright")(IMAGES, []).shape == (2,)
    assert import_named("../own_reward.py:Bright") is import_named(f"{working_folder}/own_reward.py:Bright")


def test_the_working_folder_comes_first_and_hides_nothing_afterwards(working_folder: Path) -> None:
    """A file of the user's wins over a module of its name elsewhere; what others import later is not the user's."""
    installed = working_folder / "installed"
    installed.mkdir()
    (installed / "own_reward.py").write_text("bright = None\n")
    (installed / "own_later.py").write_text("PLACE = 'installed'\n")
    (working_folder / "own_later.py").write_text("PLACE = 'working folder'\n")
    sys.path.insert(0, str(installed))
    assert import_named("own_reward:bright") is not None
    import own_later  # pyright: ignore[reportMissingImports]

    assert own_later.PLACE == "installed"


@pytest.mark.parametrize(
    "reference, message",
    [
        ("own_reward:Brigth", r"own_reward has no 'Brigth'\. Did you mean 'Bright'\? It has .*bright"),
        ("own_rewards:Bright", r"no module 'own_rewards' in the working folder .* Did you mean 'own_reward'\?"),
        ("own_rewards.py:Bright", r"there is no file .*own_rewards\.py\. Did you mean 'own_reward\.py'\?"),
        ("own_reward.py:", "is not MODULE:NAME or FILE.py:NAME"),
        ("own_missing:Bright", rf"importing own_missing raised {NOWHERE}"),
        ("own_missing.py:Bright", f"importing it raised {NOWHERE}"),
        ("own_syntax:Bright", r"importing own_syntax raised SyntaxError: .*own_syntax.py, line 1"),
        ("own_exit:Bright", r"importing own_exit raised SystemExit: 3 \(.*own_exit.py, line 1\)"),
        ("own_missing:Bright+0.5*tiny", "importing own_missing"),
        ("hpsv21", r"no reward 'hpsv21'\. Did you mean 'hpsv2\.1'\?"),
        ("pikscore", r"Did you mean 'pickscore'\?"),
        ("tiny:scorers", r"Did you mean 'scorer'\?"),
    ],
)
def test_what_can_t_be_imported_is_told_before_the_run(working_folder: Path, reference: str, message: str) -> None:
    (working_folder / "own_missing.py").write_text("import torch\nimport nowhere\n")
    (working_folder / "own_syntax.py").write_text("def Bright(:\n")
    (working_folder / "own_exit.py").write_text("raise SystemExit(3)\n")
    if "+" in reference:
        reference = f"1*{reference}"
    problem = reward_problem(reference)
    assert problem is not None
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    "name, message",
    [
        ("number", "is float, which can't be called: MODULE:NAME or FILE.py:NAME, a reward"),
        ("NeedsAFolder", r"could not be made, TypeError: .*'folder'"),
        ("Faulty", r"could not be made, FileNotFoundError: .*gone\.bin.*own_reward\.py, line 3\d"),
    ],
)
def test_what_makes_no_reward_is_told(working_folder: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_reward(f"own_reward:{name}", CPU)


def test_the_installed_command_scores_with_a_reward_of_the_working_folder(working_folder: Path) -> None:
    """`trajsurgery` has its own folder first on the path, not the working folder."""
    Image.new("RGB", (4, 4), "white").save(working_folder / "white.png")
    (working_folder / "prompts.txt").write_text("white\n")
    code = (
        f"import sys; sys.path[0] = {str(ROOT)!r}; from trajsurgery.cli import main; code = main()\n"
        f"print([m for m in {SLOW_TO_IMPORT} if m in sys.modules]); sys.exit(code)"
    )
    words = ["score", "white.png", "--prompts", "prompts.txt", "--reward", "own_reward:Bright"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.0000" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]", "what such a reward does not use costs the first picture seconds"
