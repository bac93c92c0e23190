"""A self-contained HTML page: template, style, script, plotly and pictures in one file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trajsurgery.runs.reports.charts import Chart
from trajsurgery.training.checkpoints.output_files import write_atomically

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Block:
    """A section of the page."""

    anchor: str
    name: str
    html: Any
    """Markup that `block_html` made."""


@dataclass(frozen=True)
class Page:
    """What stands on the page."""

    title: str
    subtitle: str
    cards: Sequence[tuple[str, str]]
    """(value, label) of the summary."""
    sentences: Sequence[str]
    blocks: Sequence[Block]
    charts: Sequence[Chart]
    footer: str


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def block_html(macro: str, *arguments: Any) -> Any:
    """Return the markup of a block, by the macro's name in blocks.html. Texts are escaped."""
    return getattr(_environment().get_template("blocks.html").module, macro)(*arguments)


def write_page(path: Path, page: Page) -> Path:
    """Write the page; return its path.

    Raises:
        OutputError: the file system refuses.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    figures = json.dumps({chart.name: chart.figure() for chart in page.charts}, allow_nan=False)
    html = (
        _environment()
        .get_template("page.html")
        .render(
            title=page.title,
            subtitle=page.subtitle,
            cards=[{"value": value, "label": label} for value, label in page.cards],
            sentences=page.sentences,
            blocks=page.blocks,
            sections=[(block.anchor, block.name) for block in page.blocks],
            footer=page.footer,
            css=Markup((PAGE / "page.css").read_text(encoding="utf-8")),
            script=Markup((PAGE / "page.js").read_text(encoding="utf-8")),
            plotly=Markup(get_plotlyjs()),
            figures=Markup(figures.replace("<", "\\u003c")),  # no text of a prompt ends the element
        )
    )
    write_atomically(path, lambda partial: partial.write_text(html, encoding="utf-8"))
    return path
