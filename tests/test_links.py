"""Every link in every document leads somewhere, and no fact stands in two documents."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

TRACKED = subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split()
PAGES = [ROOT / name for name in TRACKED]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<(https?://[^>\s]+)>")

STANDALONE = {".runpod/README.md", "CHANGELOG.md", "README.md"}
"""Pages that are read alone, and so repeat what others say: the hub's, the history, the first."""


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[str]:
    for inner, auto in LINK.findall(re.sub(r"`[^`\n]*`(?!\])", "", prose(page))):
        yield inner or auto


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    found: dict[str, int] = defaultdict(int)
    made = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        made.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return made


def fault(page: Path, link: str) -> str | None:
    """What is wrong with a link; None if it leads somewhere or, outside, is well formed."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        host = parts.hostname or ""
        sound = parts.scheme == "https" and re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", host)
        return None if sound else "no https URL with a public host"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return "no such file"
    if parts.fragment and parts.fragment not in anchors(target):
        return "no such heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=TRACKED)
def test_every_link_leads_somewhere(page: Path) -> None:
    faults = [(link, why) for link in links(page) if (why := fault(page, link))]
    assert faults == []


def test_there_are_links_to_check() -> None:
    assert len([link for page in PAGES for link in links(page)]) > 100


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("docs/nothing.md", "no such file"),
        ("../../etc/hostname", "no such file"),
        ("docs/errors.md#cods", "no such heading"),
        ("#nowhere", "no such heading"),
        ("http://example.com/x", "no https URL with a public host"),
        ("https:///x", "no https URL with a public host"),
        ("https://localhost:8000", "no https URL with a public host"),
        ("docs/errors.md#codes", None),
        ("docs/development.md#the-sdks-own-server", None),
        ("https://example.com/a?b#c", None),
    ],
)
def test_a_link_that_leads_nowhere_is_found(link: str, why: str | None) -> None:
    assert fault(ROOT / "README.md", link) == why


def test_the_index_names_every_document() -> None:
    index = ROOT / "docs" / "README.md"
    named = {(index.parent / urlsplit(link).path).resolve() for link in links(index)}
    assert {page for page in PAGES if page.parent == index.parent} - {index} <= named


def statements(page: Path) -> set[str]:
    """The page's longer sentences and table cells but for ranges, in small letters and without marks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose(page))
    paragraphs = re.sub(r"\n(?![\n|#*-]|\d\.)", " ", text)
    pieces = re.split(r"\n|(?<=[.:;?!])\s|\|", paragraphs)
    plain = {re.sub(r"\W+", " ", piece).strip().lower() for piece in pieces}
    return {piece for piece in plain if len(piece) >= 50 and not piece.startswith("whole number")}


def test_a_sentence_is_recognised_wherever_its_lines_break_and_its_links_lead(
    tmp_path: Path,
) -> None:
    one, other = tmp_path / "one.md", tmp_path / "other.md"
    one.write_text(
        "Short. The worker removes those\nthat were used least recently, as [here](a.md) is said."
    )
    other.write_text(
        "| cell | The worker removes those that were *used* least recently, as here is said |"
    )
    said = "the worker removes those that were used least recently as here is said"
    assert statements(one) == statements(other) == {said}


def test_no_sentence_stands_in_two_documents() -> None:
    """Where a fact changes, one page must change."""
    where: dict[str, list[str]] = defaultdict(list)
    for name in TRACKED:
        if name not in STANDALONE and not name.startswith(".github"):
            for piece in statements(ROOT / name):
                where[piece].append(name)
    assert {piece: names for piece, names in where.items() if len(names) > 1} == {}
