"""report.html and comparison.html: what they hold, that they load nothing, and that their controls work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.builders import toy_world
from tests.builders.browser import needs_browser, opened
from trajsurgery import RecipeError, Trainer
from trajsurgery.cli import main
from trajsurgery.evaluation.held_out import HeldOutScores
from trajsurgery.runs.reports.comparison_page import figures_table, read_runs, settings_table, write_comparison
from trajsurgery.runs.reports.html_report import REPORT, write_report
from trajsurgery.runs.reports.run_folder import RunFolder
from trajsurgery.runs.reports.saved_pictures import save_samples
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.settings import Evaluation, Guards

EVIL = "</script><script>document.title='owned'</script> a <b>red</b> circle"
SECTIONS = {"training", "samples", "filmstrip", "evaluation", "figures", "plan", "time-and-memory", "reproduce"}
CHARTS = {
    "reward", "loss", "grad_norm", "terms", "distance", "clamped", "times", "validation", "gains", "categories",
    "calibration", "parts", "memory",
}  # fmt: skip


class Page(HTMLParser):
    """The parts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sections, self.plots, self.links, self.text = set[str](), set[str](), list[str](), ""
        self.scripts = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.scripts += tag == "script"
        self.links += [str(values[name]) for name in ("src", "href") if name in values]
        if tag == "section":
            self.sections.add(str(values["id"]))
        if values.get("class") == "plot":
            self.plots.add(str(values["data-figure"]))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation rounds, contact sheets and a prompt that would break a careless page."""
    output = tmp_path_factory.mktemp("runs") / "first"
    evaluation = Evaluation(images=10, steps=5, batch=4, pictures=10, sheet_every=2, sheet_images=3)
    recipe = toy_world.recipe(output, evaluation=evaluation, guards=Guards(every=3, images=4))
    parts = toy_world.world(recipe)
    heldout = (Prompt(EVIL, "colours"), *toy_world.PROMPTS)
    metrics = {"held": toy_world.LikesRed()}
    parts = replace(parts, heldout=heldout, metrics=metrics, validation=toy_world.PROMPTS)
    Trainer(recipe, components=parts, console=Console(quiet=True)).train()
    return output


def test_a_run_leaves_a_page_with_everything_that_it_recorded(run: Path) -> None:
    page = Page(run / REPORT)
    assert page.sections == {"summary", *SECTIONS}
    assert page.plots == CHARTS
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert page.scripts == 3  # data, plotly, the page's own: no prompt's
    assert EVIL in page.text
    evaluation = RunFolder.read(run).evaluation
    assert evaluation
    assert f"{evaluation['reward_before']:.4f} → {evaluation['reward_after']:.4f}" in page.text
    for words in ("LeapAlign on tiny", "x^_0|", "dx_0/dtheta = ", "python 3.", '"reward": "tiny"', "pytest"):
        assert words in page.text


def test_the_curves_are_the_log_s(run: Path) -> None:
    text = (run / REPORT).read_text(encoding="utf-8")
    figures = json.loads(text.split('id="chart-data">')[1].split("</script>")[0])
    records = RunFolder.read(run).iterations
    assert figures["reward"]["data"][0]["y"] == [record["reward"] for record in records]
    assert figures["times"]["data"][0]["y"] == [
        sum(t in record["times"] for record in records) for t in figures["times"]["data"][0]["x"]
    ]
    assert [trace["name"] for trace in figures["terms"]["data"]] == ["single-step", "nested once"]
    assert figures["terms"]["data"][0]["x"] == [0, 2, 4, 6]
    assert all(len(trace["x"]) == 6 for trace in figures["parts"]["data"])


def test_a_page_is_made_of_what_is_there(run: Path, tmp_path: Path) -> None:
    """An interrupted run has no evaluation and no samples; a run of an older version neither plan nor run.json."""
    folder = tmp_path / "torn"
    shutil.copytree(run, folder)
    for name in ("samples", "sheets"):
        shutil.rmtree(folder / name)
    for name in ("plan.svg", "plan.txt", "run.json", "recipe.json"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"evaluation"' not in line) + '{"kind"')
    page = Page(write_report(folder))
    assert page.sections == {"summary", "training", "evaluation", "time-and-memory", "reproduce"}
    assert "iterations so far" in page.text
    (folder / "metrics.jsonl").write_text("")
    assert Page(write_report(folder)).sections == {"summary", "reproduce"}


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_another_folder_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / what
    if what == "empty":
        folder.mkdir()
    assert main(["report", str(folder)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "is no run's output folder" in said
    assert ("no metrics.jsonl" if what == "empty" else "no such folder") in said


def scores(pictures: torch.Tensor) -> HeldOutScores:
    n = len(pictures)
    return HeldOutScores(("a",) * n, ("all",) * n, torch.linspace(0, 1, n), None, None, pictures)


def test_pictures_are_saved_as_they_are_and_videos_move(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 8, 12), generator=generator, dtype=torch.uint8)
    videos = torch.randint(256, (2, 5, 3, 8, 12), generator=generator, dtype=torch.uint8)
    save_samples(tmp_path / "images", scores(images), scores(images.flip(0)))
    with Image.open(tmp_path / "images/samples/after/000.png") as picture:
        assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), images[1])
    save_samples(tmp_path / "videos", scores(videos), scores(videos))
    with Image.open(tmp_path / "videos/samples/before/001.webp") as film:
        assert film.n_frames == 5  # pyright: ignore[reportAttributeAccessIssue]
    entries = json.loads((tmp_path / "videos/samples/samples.json").read_text())
    assert [entry["before"]["file"] for entry in entries] == ["before/000.webp", "before/001.webp"]


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    save_samples(tmp_path, *[scores(torch.zeros(1, 3, 600, 1200, dtype=torch.uint8))] * 2)
    with Image.open(tmp_path / "samples/after/000.png") as picture:
        assert picture.size == (512, 256)


@pytest.fixture(scope="module")
def second(run: Path) -> Path:
    """The same run with other settings and another end."""
    folder = run.parent / "second"
    shutil.copytree(run, folder)
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["optimiser"]["rate"] = 0.5
    (folder / "recipe.json").write_text(json.dumps(recipe))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["reward_after"] = 0.9876
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_compared(run: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = read_runs([run, second])
    headings, rows = figures_table(runs)
    assert headings == ["", "first", "second"]
    assert next(row for row in rows if row[0] == "reward")[2].split()[2] == "0.9876"
    assert settings_table(runs) == (["setting", "first", "second"], [["optimiser.rate", "0.01", "0.5"]])
    page = Page(write_comparison([run, second], tmp_path / "c.html"))
    assert page.sections == {"figures", "curves", "pictures", "settings"}
    assert {"reward", "loss", "grad_norm"} <= page.plots
    assert main(["compare", str(run), str(second), "--output", str(tmp_path / "d.html")]) == 0
    assert (tmp_path / "d.html").read_text() == (tmp_path / "c.html").read_text()
    assert "0.9876" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="stands there twice"):
        read_runs([run, run])
    assert main(["compare", str(run)]) == 1


@needs_browser
@pytest.mark.parametrize("width, scheme", [(1200, "light"), (1200, "dark"), (390, "light")])
def test_a_browser_shows_the_report(run: Path, width: int, scheme: str) -> None:
    with opened(run / REPORT, width, scheme) as (page, faults):
        assert page.title() == "LeapAlign on tiny"
        assert page.locator(".plot .main-svg").count() >= len(CHARTS)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 25, 29)"}[scheme]
        assert faults == []


@needs_browser
def test_the_report_s_controls_work(run: Path) -> None:
    with opened(run / REPORT) as (page, faults):
        compare = page.locator(".compare").first
        compare.locator("input").fill("20")
        assert compare.evaluate("node => node.style.getPropertyValue('--cut')") == "20%"
        assert "80%" in compare.locator(".over").evaluate("node => getComputedStyle(node).clipPath")

        pairs = page.locator(".pair")
        everything = pairs.count()
        page.get_by_role("button", name="colours").click()
        shown = page.locator(".pair:not([hidden])")
        assert 0 < shown.count() < everything
        assert set(shown.evaluate_all("all => all.map(node => node.dataset.category)")) == {"colours"}
        page.get_by_role("button", name="all", exact=True).click()
        assert shown.count() == everything

        shown.first.locator(".prompt").click()
        dialog = page.locator("#zoom")
        assert dialog.is_visible()
        assert dialog.locator("img").count() == 2
        page.get_by_label("Close").click()
        assert not dialog.is_visible()

        colour = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
        before = page.evaluate(colour)
        page.locator("#theme").click()
        page.wait_for_function(f"{colour} !== {json.dumps(before)}")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 25, 29)"

        page.locator("[data-figure=loss] .nsewdrag").first.hover()
        page.wait_for_selector(".hoverlayer .legend")
        assert faults == []


@needs_browser
def test_a_browser_shows_a_comparison(run: Path, second: Path, tmp_path: Path) -> None:
    with opened(write_comparison([run, second], tmp_path / "c.html"), 390) as (page, faults):
        names: Any = page.locator("[data-figure=reward] .legendtext").all_text_contents()
        assert names == ["first", "second"]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert faults == []
