"""A real headless Chromium, if one is installed: it opens a page from the disk and may load nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium, or Google Chrome")


@contextmanager
def opened(
    file: Path, width: int = 1200, scheme: Literal["light", "dark"] = "light"
) -> Generator[tuple[Any, list[str]]]:
    """A page, and what went wrong on it so far: console messages, errors, requests beyond the file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        faults = list[str]()
        page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else faults.append(r.url))
        page.goto(file.as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        yield page, faults
        browser.close()
