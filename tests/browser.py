"""A headless Chromium for tests of pages: Debian's own, driven by Playwright (https://playwright.dev/python).

Tests skip where no Chromium is installed, unless MECHMERGE_NEED_CHROMIUM is set: then its lack is a failure (continuous
integration sets it, so that nothing is skipped unseen).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"desktop": 1280, "phone": 390}


def chromium() -> str:
    """The path of an installed Chromium; skips the test, or fails it, where there is none."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        said = "no chromium on the path (Debian: apt-get install chromium)"
        pytest.fail(said) if os.environ.get("MECHMERGE_NEED_CHROMIUM") else pytest.skip(said)
    return found


@contextmanager
def headless() -> Iterator[Browser]:
    """A browser that is closed when the block ends."""
    path = chromium()
    # Chromium's sandbox refuses to run as root, as containers do.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Opened:
    """A page, with everything that it asked for and complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))


@contextmanager
def opened(
    browser: Browser, path: Path | str, width: str = "desktop", theme: Any = "light", **options: Any
) -> Iterator[Opened]:
    """A page at one width and theme, without motion.

    Args:
        path: a file, which is opened offline, or an address.
        options: further options of a Playwright context, such as `java_script_enabled`.
    """
    context = browser.new_context(
        viewport={"width": WIDTHS[width], "height": 900},
        color_scheme=theme,
        has_touch=width == "phone",
        offline=isinstance(path, Path),
        reduced_motion="reduce",
        **options,
    )
    try:
        shown = Opened(context.new_page())
        shown.page.goto(path.as_uri() if isinstance(path, Path) else path)
        yield shown
    finally:
        context.close()


def at_rest(page: Page) -> None:
    """Waits until what a scroll sets off is over: its event comes with the next frame."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def open_all(page: Page) -> None:
    """Opens every closed section and waits until all charts are drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    # Asked from outside, again and again: the page's policy forbids the evaluation of strings that wait_for_function needs.
    undrawn = "[...document.querySelectorAll('[data-chart]')].filter((one) => !one.querySelector('canvas, svg')).length"
    for _ in range(100):
        if page.evaluate(undrawn) == 0:
            return
        page.wait_for_timeout(50)
    pytest.fail(f"{page.evaluate(undrawn)} charts are not drawn")
