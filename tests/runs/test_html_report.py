"""report.html and comparison.html: what they hold, that they load nothing, and that their controls work."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.builders import toy_world
from tests.builders.browser import needs_browser, opened
from tests.runs.test_saved_pictures import scores
from trajsurgery import RecipeError, Trainer
from trajsurgery.cli import main
from trajsurgery.runs.reports.comparison_page import figures_table, read_runs, settings_table, write_comparison
from trajsurgery.runs.reports.html_report import REPORT, write_report
from trajsurgery.runs.reports.run_folder import RunFolder
from trajsurgery.runs.reports.saved_pictures import save_samples, save_sheet
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


def chart_data(page: Path) -> dict[str, Any]:
    """The figures that plotly draws, by name."""
    text = page.read_text(encoding="utf-8")
    return json.loads(text.split('id="chart-data">')[1].split("</script>")[0])


def test_the_curves_are_the_log_s(run: Path) -> None:
    figures = chart_data(run / REPORT)
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


def test_a_run_whose_numbers_left_their_range_has_a_page(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "diverged"
    shutil.copytree(run, folder)
    path = folder / "sheets/000004/sheet.json"
    sheet = json.loads(path.read_text())
    sheet |= {"rewards": [math.nan, *sheet["rewards"][1:]], "terms": dict.fromkeys(sheet["terms"], math.inf)}
    path.write_text(json.dumps(sheet))
    page = Page(write_report(folder))
    assert page.plots == CHARTS
    assert page.text.count("not finite") == 1
    assert chart_data(folder / REPORT)["terms"]["data"][0]["y"][2] is None


def test_a_curve_of_one_iteration_is_a_point(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(run, folder)
    path = folder / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if '"iteration", "iteration": 1,' in line]
    path.write_text("".join(lines))
    curve = chart_data(write_report(folder))["loss"]["data"][0]
    assert (curve["mode"], len(curve["x"])) == ("markers", 1)
    assert chart_data(run / REPORT)["loss"]["data"][0]["mode"] == "lines"


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_another_folder_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / what
    if what == "empty":
        folder.mkdir()
    assert main(["report", str(folder)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "is no run's output folder" in said
    assert ("no metrics.jsonl" if what == "empty" else "no such folder") in said


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
def test_a_browser_shows_the_report(run: Path, width: int, scheme: Literal["light", "dark"]) -> None:
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


@needs_browser
def test_a_browser_plays_videos(run: Path, tmp_path: Path) -> None:
    """Of the picture of a moving square the browser shows different frames after a while."""
    folder = tmp_path / "video"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "samples")
    video = torch.zeros(1, 8, 3, 16, 16, dtype=torch.uint8)
    for frame in range(8):
        video[0, frame, :, :, 2 * frame : 2 * frame + 2] = 255
    save_samples(folder, scores(video), scores(video))
    save_sheet(folder, 7, scores(video), None)
    with opened(write_report(folder)) as (page, faults):
        assert page.locator("img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")
        assert page.locator(".pair img").first.get_attribute("src").startswith("data:image/webp")
        picture, seen = page.locator(".pair .compare").first, set[bytes]()
        picture.scroll_into_view_if_needed()
        for _ in range(20):
            seen.add(picture.screenshot())
            page.wait_for_timeout(60)
        assert len(seen) > 2
        assert faults == []


def test_a_contact_sheet_is_also_one_picture(run: Path) -> None:
    with Image.open(run / "sheets/000002/sheet.png") as sheet:
        assert sheet.size == (3 * 18 + 2, 16 + 4)  # three pictures of 16 pixels, with borders of 2
