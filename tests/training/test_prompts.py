"""Prompt sets are read in the formats that they are published in; other content is refused with its place."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from trajsurgery import LeapAlign, RecipeError, tiny
from trajsurgery.training import prompts
from trajsurgery.training.checks import preflight
from trajsurgery.training.prompts import Prompt, read_prompts, repetitions
from trajsurgery.training.recipe import Recipe

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [], "prompt": "a photo of two cows"},
]


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON or JSONL file and return its path."""
    text = "\n".join(map(json.dumps, value)) + "\n" if path.suffix == ".jsonl" else json.dumps(value)
    path.write_text(text)
    return path


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(prompt.text, prompt.category) for prompt in read_prompts(path)]


def test_text_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("  a cat \n\n a dog\na cat\n")
    assert pairs(tmp_path / "p.txt") == [("a cat", "all"), ("a dog", "all"), ("a cat", "all")]
    (tmp_path / "prompts").write_text('{"prompt": "not read as JSON"}\n')
    assert pairs(tmp_path / "prompts") == [('{"prompt": "not read as JSON"}', "all")]
    (tmp_path / "marked.txt").write_text("a cat\n", encoding="utf-8-sig")
    assert pairs(tmp_path / "marked.txt") == [("a cat", "all")]


def test_jsonl_of_strings_and_objects(tmp_path: Path) -> None:
    rows = ["a cat", {"text": " a dog "}, {"Caption": "a cow", "Category": "farm"}, {"prompt": "x\u2028y", "style": 3}]
    assert pairs(write_json(tmp_path / "p.jsonl", rows)) == [
        ("a cat", "all"),
        ("a dog", "all"),
        ("a cow", "farm"),
        ("x\u2028y", "3"),
    ]
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf"marked"\r\n\r\n{"prompt": "second", "category": null}')
    assert pairs(tmp_path / "q.jsonl") == [("marked", "all"), ("second", "all")]


@pytest.mark.parametrize("ending, mark", [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("csv", "\t")])
def test_tables_have_a_column_of_prompts(tmp_path: Path, ending: str, mark: str) -> None:
    quoted = ("1", f'"a cat{mark} asleep"', "animals")
    rows = (("ID", "Prompt", "Category"), quoted, ("2", " a dog ", ""), ("3", "a cow"))
    text = "\r\n".join(mark.join(row) for row in rows)
    (tmp_path / f"p.{ending}").write_bytes(text.encode("utf-8-sig"))
    assert pairs(tmp_path / f"p.{ending}") == [(f"a cat{mark} asleep", "animals"), ("a dog", "all"), ("a cow", "all")]


def test_letters_of_all_scripts_and_marks_are_no_control_characters(tmp_path: Path) -> None:
    texts = ["naïve café", "一只猫", "ماهی\u200cگیر", "👩\u200d🚀 in space", "tab\there", "a\u2028b"]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    assert [text for text, _ in pairs(tmp_path / "p.txt")] == texts


def test_repetitions_are_counted() -> None:
    for split in ("train", "validation", "heldout"):
        assert repetitions("tiny", [prompt.text for prompt in tiny.prompts(split)]) is None
    assert repetitions("p.txt", ["a", "b"]) is None
    assert repetitions("p.txt", ["a", "b", "a", "a"]) == (
        "p.txt: 2 of 4 prompts repeat others; each is drawn and counted as often as it occurs."
    )


def test_geneval_keeps_the_rows_that_its_evaluator_reads(tmp_path: Path) -> None:
    read = read_prompts(write_json(tmp_path / "evaluation_metadata.jsonl", GENEVAL))
    assert read == (Prompt("a photo of a bench", "single_object"), Prompt("a photo of two cows", "counting"))
    assert [prompt.record for prompt in read] == GENEVAL


def test_hpdv2(tmp_path: Path) -> None:
    """The benchmark's styles as files, as a folder, and as hpsv2.benchmark_prompts('all'); the training pairs."""
    styles = {"anime": ["a knight", "a fox"], "photo": ["a street"]}
    for style, rows in styles.items():
        write_json(tmp_path / f"{style}.json", rows)
    (tmp_path / "benchmark_imgs").mkdir()
    expected = [("a knight", "anime"), ("a fox", "anime"), ("a street", "photo")]
    assert pairs(tmp_path / "anime.json") == expected[:2]
    assert pairs(tmp_path) == expected
    assert pairs(write_json(tmp_path / "all.json", styles)) == expected
    train = [
        {"human_preference": [1, 0], "prompt": "a hat", "file_path": ["1.jpg", "2.jpg"]},
        {"human_preference": [0, 1], "prompt": "a hat", "file_path": ["1.jpg", "3.jpg"]},
        {"prompt": "a boat", "image_path": ["4.jpg"], "rank": [0], "raw_annotations": []},
    ]
    assert pairs(write_json(tmp_path / "train.json", train)) == [("a hat", "train"), ("a boat", "train")]


def test_mjhq(tmp_path: Path) -> None:
    rows = {"12ab": {"category": "plants", "prompt": "a garden "}, "9c": {"category": "food", "prompt": "a cake"}}
    assert pairs(write_json(tmp_path / "meta_data.json", rows)) == [("a garden", "plants"), ("a cake", "food")]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow import parquet

    columns = {"Prompt": ["a cat", "a dog"], "Category": ["animals", None], "image": [b"\xff\xd8", b"\xff\xd8"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    read = read_prompts(tmp_path / "p.parquet")
    assert read == (Prompt("a cat", "animals"), Prompt("a dog", "all"))
    assert read[0].record == {"Prompt": "a cat", "Category": "animals"}, "pictures are not read"
    parquet.write_table(pyarrow.table({"image": [b"x"], "label": [1]}), tmp_path / "q.parquet")
    with pytest.raises(RecipeError, match="no column prompt, text, caption; it has image, label"):
        read_prompts(tmp_path / "q.parquet")
    (tmp_path / "r.parquet").write_text("nothing of that")
    with pytest.raises(RecipeError, match="no parquet file"):
        read_prompts(tmp_path / "r.parquet")


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1")

    def without_pyarrow(name: str) -> ModuleSpec | None:
        return None if name == "pyarrow" else sys.modules[name].__spec__

    monkeypatch.setattr(prompts, "find_spec", without_pyarrow)
    with pytest.raises(RecipeError, match=r"pip install 'trajsurgery\[parquet\]'"):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "no text in UTF-8"),
        ("p.jsonl", '"a"\n{"prompt": \n', "line 2 is not JSON"),
        ("p.jsonl", '"a"\n\n{"image": 3}\n', r'line 3 is \{"image": 3\}, which has no prompt'),
        ("p.jsonl", '{"prompt": " "}', "line 1 is .* has no prompt"),
        ("p.json", '["a", 7]', "row 1 is 7, which has no prompt"),
        ("p.json", '{"x": {"category": "y"}}', "'x' is .* no prompt"),
        ("p.json", '{"x": ["a"], "y": 3}', "'x' is .* no prompt"),
        ("p.json", '"a cat"', "holds str: JSON prompts are a list or an object"),
        ("p.json", "[]", "holds no prompt"),
        ("p.JSON", "[7]", "row 0 is 7, which has no prompt"),
        ("p.csv", "id,prompt\n", "holds no prompt"),
        ("p.csv", "a cat\na dog\n", "no column prompt, text, caption; it has a cat"),
        (
            "p.csv",
            "id,prompt\n1,a cat, sleeping\n",
            r"line 2 has more fields than the header: .* in quotes",
        ),
        ("p.csv", 'prompt\n"a\ncat"\n""\n', r"line 4 is .* no prompt"),
        ("p.csv", 'prompt\n"a cat\n', "can't be read near line 1"),
        ("p.txt", "a cat\na \0dog\n", r"line 2 has the control character U\+0000 after 'a '"),
        ("p.txt", "a cat\n\n\x1b[31ma dog\n", r"line 3 has the control character U\+001B"),
        ("p.txt", "a cat\x0ba dog\n", r"line 1 has the control character U\+000B after 'a cat'"),
        ("p.txt", "a cat\n\ufeffa dog\n", r"line 2 has the control character U\+FEFF"),
        ("p.csv", "prompt\na \x07cat\n", r"line 2 has the control character U\+0007"),
        ("p.jsonl", '"a"\n{"prompt": "a\\u0000"}', r"line 2 has the control character U\+0000"),
        ("p.json", '["a", "b\\ud800"]', r"row 1 has the control character U\+D800"),
    ],
)
def test_a_row_without_a_prompt_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError, match=message) as error:
        read_prompts(tmp_path / name)
    assert name in str(error.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*gone\.txt.*\.parquet"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(RecipeError, match="a folder without prompts"):
        read_prompts(tmp_path)


def test_all_wrong_prompt_sets_of_a_recipe_are_reported_at_once(tmp_path: Path) -> None:
    rows = str(write_json(tmp_path / "evaluation_metadata.jsonl", GENEVAL))
    preflight.check_recipe(Recipe(method=LeapAlign(), prompts=rows, heldout=rows))
    bad = str(write_json(tmp_path / "bad.json", [7]))
    with pytest.raises(RecipeError) as error:
        preflight.check_recipe(Recipe(prompts=bad, heldout=str(tmp_path / "gone")))
    assert "no training prompts" in str(error.value)
    assert "row 0 is 7" in str(error.value)
    assert "no held-out prompts" in str(error.value)
