"""The page over the emulator with real workers on the demo model, and a browser."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from page.backend import Endpoint
from tests.conftest import ROOT
from tests.emulator.running import Emulator, emulator
from tests.page.browser import chromium, opened
from tests.page.serving import Served, served
from tests.production import ENVIRONMENT, loras_of, platform

KEY = "rpa_the-pages-key-stays-in-its-server"


@dataclass
class Site:
    """What a test of the page needs: the platform, the page's address, the volume."""

    platform: Emulator
    page: Served
    loras: Path
    faults: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.page.url + "/"

    def pixels(self, given: dict[str, Any]) -> bytes:
        """The picture of a job of its own."""
        done = self.platform.end(self.platform.run(given))
        assert done["status"] == "COMPLETED", done
        return pixels_of(done["output"]["images"][0])


def pixels_of(data_uri: str) -> bytes:
    picture = Image.open(io.BytesIO(base64.b64decode(data_uri.split(",")[1])))
    return picture.convert("RGB").tobytes()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with (
        platform(folder, workers=2) as running,
        served(lambda: Endpoint(f"{running.base}/local", KEY)) as page,
    ):
        yield Site(running, page, loras_of(folder))


@pytest.fixture(scope="module")
def text_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("text")
    environment = {**ENVIRONMENT, "WORKER_KIND": "text", "HF_HUB_OFFLINE": "1"}
    del environment["WORKER_MODEL"]
    shutil.copytree(ROOT / "demo" / "text" / "loras", loras_of(folder))
    options = ("--volume", str(folder / "volume"))
    with (
        emulator(folder, *options, program=("handler.py",), **environment) as running,
        served(lambda: Endpoint(f"{running.base}/local", KEY)) as page,
    ):
        running.wait_for_workers(1)
        yield Site(running, page, loras_of(folder))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(site: Site, browser: Browser) -> Iterator[Page]:
    """The page in a browser that has no history; nothing may go wrong in it."""
    yield from one_tab(site, browser)


@pytest.fixture
def text_tab(text_site: Site, browser: Browser) -> Iterator[Page]:
    yield from one_tab(text_site, browser)


def one_tab(site: Site, browser: Browser) -> Iterator[Page]:
    faults: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    yield opened(context, site.url, faults)
    context.close()
    assert faults == []
