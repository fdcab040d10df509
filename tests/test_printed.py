"""Everything printed runs: each command and snippet of README and docs, as it stands there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.printed.blocks import PAGES, Block, blocks, spans
from tests.printed.clone import PROGRAMS
from tests.printed.lookup import look_up_span, look_up_variables
from tests.printed.page import Page
from tests.printed.world import World

pytestmark = pytest.mark.slow
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
BLOCKS = [
    (number, block) for page in PAGES for number, block in enumerate(blocks(page, TEXTS[page]))
]


class Pages:
    """The pages, each opened once, and broken copies of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.world = folder, World(folder)
        self._open: dict[str, Page] = {}
        self._all: list[Page] = []

    def of(self, name: str) -> Page:
        if name not in self._open:
            self._open[name] = self.new(name, TEXTS[name])
        return self._open[name]

    def new(self, name: str, text: str) -> Page:
        folder = self.folder / f"page-{len(self._all)}"
        folder.mkdir()
        self._all.append(Page(name, text, folder, self.world))
        return self._all[-1]

    def close(self) -> None:
        for page in self._all:
            page.close()
        self.world.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, own_fallback: None) -> Iterator[Pages]:
    found = Pages(tmp_path_factory.mktemp("printed"))
    yield found
    found.close()


@pytest.mark.parametrize(("number", "block"), BLOCKS, ids=[str(block) for _, block in BLOCKS])
def test_what_is_printed_is_what_comes_out(number: int, block: Block, pages: Pages) -> None:
    needed = [*block.text.split(), {"js": "node"}.get(block.language)]
    for program in PROGRAMS:
        if program in needed and not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    pages.of(block.page).check(number)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_variable_in_a_sentence_is_there(page: str) -> None:
    look_up_variables(TEXTS[page])
    for code in spans(TEXTS[page]):
        look_up_span(code)
