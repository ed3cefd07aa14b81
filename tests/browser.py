"""Pages in a real browser without a head: what asks the network for anything, or logs an error, fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--enable-unsafe-swiftshader")  # without a GPU, WebGL is drawn in software


def chromium() -> Path | None:
    """The browser, if there is one: ``SAMKERN_CHROMIUM``, or on the path."""
    names = (os.environ.get("SAMKERN_CHROMIUM"), *NAMES)
    return next((Path(found) for found in (shutil.which(name) for name in names if name) if found), None)


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(path), args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page of playwright, as wide as a desk. ``requested`` has what it asked for, ``errors`` what went wrong.

    After the test there must have been no error, and nothing asked of the network.
    """
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.requested, opened.errors = [], []
    opened.on("console", lambda said: opened.errors.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on("request", lambda request: opened.requested.append(request.url))
    yield opened
    context.close()
    assert not opened.errors
    assert all(url.startswith(("file:", "data:", "blob:", "about:")) for url in opened.requested), opened.requested
