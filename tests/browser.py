"""A real browser for pages that tests have made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ARGUMENTS = ("--no-sandbox", "--enable-unsafe-swiftshader")  # without a GPU, WebGL is drawn in software


def chromium() -> Path | None:
    """Where it is, if it is there: ``SAMKERN_CHROMIUM``, or on the path."""
    names = (os.environ.get("SAMKERN_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, (shutil.which(name) for name in names if name)), None)
    return Path(found) if found else None


@pytest.fixture
def page():
    """A page that notes what it asks for in ``requested`` and what goes wrong in ``errors``."""
    path = chromium()
    if path is None:
        pytest.skip("no chromium: install it, or name it in SAMKERN_CHROMIUM")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        opened = browser.new_page(viewport={"width": 900, "height": 700})
        opened.requested, opened.errors = [], []
        opened.on("request", lambda request: opened.requested.append(request.url))
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
        yield opened
        browser.close()
