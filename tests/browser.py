"""Pages in a real browser without a head: what asks the network for anything, or logs an error, fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> Path | None:
    """The browser, if there is one."""
    return next((Path(found) for found in map(shutil.which, NAMES) if found), None)


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(path), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page of playwright, as wide as a desk. After the test it must have been offline and without errors."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    opened, faults = context.new_page(), []
    opened.on("console", lambda said: faults.append(f"console: {said.text}") if said.type == "error" else None)
    opened.on("pageerror", lambda error: faults.append(f"exception: {error}"))
    asked = ("file:", "data:", "blob:", "about:")
    opened.on(
        "request", lambda request: None if request.url.startswith(asked) else faults.append(f"asked {request.url}")
    )
    yield opened
    context.close()
    assert not faults
