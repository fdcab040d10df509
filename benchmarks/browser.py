"""How fast the page is in a real browser: 1,000 cards, and a search among them.

    python -m benchmarks.browser

The page over a worker in its own process, with 1,000 adapters on the volume that were scanned before, in
Chromium without a window. Each figure is the median of several; the time of cards runs from the start of the
navigation until all are in the document and one frame was drawn. Writes `benchmarks/results/page.json` and
the table in docs/page.md.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Request

from benchmarks.report import fill_in, write_result
from demo.__main__ import LORAS
from handler import Worker
from page.local import Local
from page.server import STATIC
from settings import Settings
from tests.page.browser import chromium
from tests.page.serving import Served, served

CARDS, TIMES = 1000, 5

WANTED = {"cards_seconds": 2.0, "search_ms": 50.0}

CARDS_SHOWN = """(count) => new Promise((resolve) => {
  const look = () => document.querySelectorAll("#panel-image .card").length >= count
    ? requestAnimationFrame(() => setTimeout(() => resolve(performance.now())))
    : setTimeout(look, 5);
  look();
})"""

SEARCHED = """(text) => new Promise((resolve) => {
  const field = document.querySelector("#panel-image input[type=search]"), begun = performance.now();
  field.value = text;
  field.dispatchEvent(new Event("input"));
  document.querySelector("#panel-image .cards").getBoundingClientRect();
  const worked = performance.now() - begun;
  requestAnimationFrame(() => setTimeout(() => resolve([worked, performance.now() - begun])));
})"""


def measure(page: Served, browser: Browser) -> dict[str, Any]:
    """The figures, once the library was read a first time."""
    cards, searched, drawn, requests = [], [], [], 0
    for number in range(TIMES + 1):
        tab = browser.new_page()
        asked: list[str] = []
        tab.on("request", _into(asked))
        tab.goto(page.url + "/", wait_until="commit")
        seconds = tab.evaluate(CARDS_SHOWN, CARDS) / 1000
        requests = len([url for url in asked if "/api/" not in url])
        for text in ("number 7", "nothing has this", "", "99", "stripes"):
            worked, whole = tab.evaluate(SEARCHED, text)
            if number:
                searched.append(worked)
                drawn.append(whole)
        if number:  # the first time fills the worker's list
            cards.append(seconds)
        tab.close()
    return {
        "cards": CARDS,
        "cards_seconds": round(statistics.median(cards), 3),
        "search_ms": round(statistics.median(searched), 1),
        "search_and_frame_ms": round(statistics.median(drawn), 1),
        "files": requests,
        "kilobytes": round(sum(path.stat().st_size for path in STATIC.iterdir()) / 1000, 1),
        "wanted": WANTED,
    }


def _into(asked: list[str]) -> Callable[[Request], None]:
    return lambda request: asked.append(request.url)


def main() -> None:
    """Measures, and writes the result and the page's table."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        first = root / "number 0 of many.safetensors"
        first.write_bytes((LORAS / "demo-stripes.safetensors").read_bytes())
        for number in range(1, CARDS):
            os.link(first, root / f"number {number} of many.safetensors")
        worker = Worker(Settings(model="demo", device="cpu", lora_cache_dir=root)).setup()
        worker.parts.catalog.scan()
        with served(lambda: Local(worker)) as page, chromium() as browser:
            figures = measure(page, browser)
    write_result("page", figures)
    rows = (
        (
            "1,000 cards are there",
            f"{figures['cards_seconds']} s",
            f"{WANTED['cards_seconds']:g} s",
        ),
        ("a search among them", f"{figures['search_ms']} ms", f"{WANTED['search_ms']:g} ms"),
        ("the same with the frame drawn", f"{figures['search_and_frame_ms']} ms", ""),
        ("the page's files", f"{figures['files']}, {figures['kilobytes']} kB", "200 kB"),
    )
    lines = ["| | measured | at most |", "| --- | --- | --- |"]
    fill_in("page.md", "page", "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    print(figures)


if __name__ == "__main__":
    main()
