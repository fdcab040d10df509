"""Debian's Chromium without a window, for tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    sync_playwright,
)

from tests.waiting import PATIENCE

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

found = next(filter(None, map(shutil.which, BROWSERS)), None)

needs_browser = pytest.mark.skipif(
    found is None, reason="no Chromium is installed: apt-get install chromium"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that asks nobody but the page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"],
        )
        try:
            yield browser
        finally:
            browser.close()


def opened(context: BrowserContext, url: str, faults: list[str]) -> Page:
    """The page, ready to be used; whatever goes wrong in it, or leads elsewhere, is put into `faults`."""

    def said(message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(f"console: {message.text}")

    def asked(dialog: Dialog) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def requested(request: Request) -> None:
        if not request.url.startswith((url.split("#", maxsplit=1)[0], "data:", "blob:")):
            faults.append(f"asked {request.url}")

    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("console", said)
    page.on("dialog", asked)
    page.on("request", requested)
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    return page
