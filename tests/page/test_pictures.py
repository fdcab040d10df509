"""The pictures of docs/page.md, taken of the page as it is; `PAGE_PICTURES=docs` writes them there."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.conftest import ROOT
from tests.page.browser import needs_browser
from tests.page.conftest import Site
from tests.page.test_in_a_browser import drawn, pick, prepare
from tests.waiting import PATIENCE

pytestmark = [needs_browser, pytest.mark.slow]

expect.set_options(timeout=PATIENCE * 1000)

STEPS = 20 if "PAGE_PICTURES" in os.environ else 2
NAMES = ("demo-night", "demo-outline", "demo-spiral", "demo-stripes")


def keep(tab: Page, folder: Path, name: str) -> None:
    """Saves what is seen, as a small WebP."""
    with Image.open(io.BytesIO(tab.screenshot())) as picture:
        seen = picture.convert("RGB")
    assert len(seen.getcolors(1 << 24) or []) > 50
    seen.save(folder / f"page-{name}.webp", quality=75, method=6)


def test_the_pictures_of_the_document_are_taken(tab: Page, site: Site, tmp_path: Path) -> None:
    folder = Path(os.environ.get("PAGE_PICTURES", tmp_path))
    tab.set_viewport_size({"width": 1180, "height": 760})
    prepare(tab, num_inference_steps=STEPS, seed=1)
    for name in NAMES:
        pick(tab, name)
        drawn(tab)
        tab.get_by_role("button", name=f"Thumbnail of {name}").click()
        card = tab.locator(f"#panel-image .card[data-name='{name}.safetensors']")
        expect(card.locator("img")).to_have_count(1)
        card.scroll_into_view_if_needed()
        expect(card.locator("img[src]")).to_have_count(1)
        tab.get_by_role("button", name=f"Remove {name}").click()
    pick(tab, "demo-stripes", 0.8)
    drawn(tab)
    tab.evaluate("window.scrollTo(0, 0)")
    keep(tab, folder, "image")
    for line in ("stripes", "night"):  # a name of its own, for the library's picture
        tab.evaluate(
            "(name) => import('/static/api.js').then((api) => api.act('library.activate', { name }))",
            f"demo-{line}",
        )
    tab.get_by_role("button", name="Remove demo-stripes").click()
    tab.click("#tab-compare")
    tab.fill("#values-across", "\n".join(NAMES))
    tab.fill("#values-down", "0.25, 0.5, 0.75, 1")
    tab.click("#compare")
    expect(tab.locator("#grid img")).to_have_count(16)
    tab.locator("#grid").scroll_into_view_if_needed()
    tab.evaluate("window.scrollTo(0, 240)")
    keep(tab, folder, "compare")
    tab.click("#tab-library")
    tab.click("#scan")
    expect(tab.locator("#scanned")).to_contain_text("2 active")
    tab.locator("#panel-library .card[data-name='demo-stripes.safetensors']").click()
    expect(tab.locator("#adapter svg rect")).not_to_have_count(0)
    tab.locator("#adapter svg").scroll_into_view_if_needed()
    tab.evaluate("document.getElementById('adapter').scrollTo(0, 120)")
    keep(tab, folder, "library")
    assert len(list(folder.glob("page-*.webp"))) == 3


def test_the_documents_pictures_are_there_and_small() -> None:
    page = (ROOT / "docs" / "page.md").read_text()
    pictures = list((ROOT / "docs").glob("page-*.webp"))
    assert {path.name for path in pictures} == {
        name for name in (one.split(")")[0] for one in page.split("](")[1:]) if name[:5] == "page-"
    }
    assert sum(path.stat().st_size for path in pictures) < 300_000
