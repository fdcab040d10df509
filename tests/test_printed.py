"""Everything printed runs: each command and snippet of README and docs, as it stands there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.printed.blocks import PAGES, REASONS, Block, Wrong, blocks, console, spans
from tests.printed.clone import PROGRAMS
from tests.printed.compare import compare_text
from tests.printed.lookup import look_up_span, look_up_variables
from tests.printed.page import Page
from tests.printed.world import World

pytestmark = pytest.mark.slow
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
BLOCKS = [
    (number, block) for page in PAGES for number, block in enumerate(blocks(page, TEXTS[page]))
]
CONSOLES = [(number, block) for number, block in BLOCKS if block.language == "console"]


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


def test_the_pictures_of_library_use_are_others(pages: Pages) -> None:
    page = pages.of("docs/library-use.md")
    page.check(len(page.blocks) - 1)
    pictures = "{one.tobytes() for one in (plain, striped, merged, both, dark, styled)}"
    assert page.clone.python(f"print(len({pictures}))", "here") == (True, "6\n")


# --- what is not run --------------------------------------------------------------------------------


def test_what_is_not_run_has_a_reason_and_is_no_more_than_this() -> None:
    unrun = [(block.page, block.reason) for _, block in BLOCKS if block.reason]
    assert sorted(unrun) == [
        ("CONTRIBUTING.md", "sets up the machine"),
        ("README.md", "sets up the machine"),
        ("docs/deployment.md", "needs Docker"),
        ("docs/text.md", "sets up the machine"),
        ("docs/tools.md", "needs weights of full size"),
    ]
    assert {reason for _, reason in unrun} <= REASONS
    marks = {block.mark for _, block in BLOCKS if not block.reason and not block.writes}
    assert marks <= {"", "shortened"}


# --- what is broken on purpose ----------------------------------------------------------------------


def broken(pages: Pages, name: str, old: str, new: str) -> tuple[Page, int]:
    """A copy of the page with something else in place of `old`, and the number of the block that has it."""
    assert old in TEXTS[name], f"{name} has no {old} any more"
    page = pages.new(name, TEXTS[name].replace(old, new))
    return page, next(number for number, block in enumerate(page.blocks) if new in block.text)


@pytest.mark.parametrize(
    ("page", "old", "new", "fault"),
    [
        ("README.md", "make demo ", "make dema ", "no target `make dema`"),
        ("README.md", "--scheduler K_EULER", "--sampler K_EULER", "has no option --sampler"),
        ("README.md", "-m lora generate", "-m lora generates", "no command `lora generates`"),
        ("README.md", "lora/ pipelines/", "lora/ pipeline/", "there is no pipeline/"),
        ("README.md", '/runsync" -d', '/runsink" -d', "exit code"),
        ("README.md", '-H "Authorization: Bearer', '-H "Authorization: Bear', "exit code"),
        ("README.md", ".output.image_url job", ".output.image_uri job", "picture.png"),
        (
            "README.md",
            '["output"]["image_url"]',
            '["output"]["image_uri"]',
            "KeyError: 'image_uri'",
        ),
        ("README.md", "job.output.image_url", "job.output.image_uri", "TypeError"),
        ("README.md", "job.json | cut -d, -f2", "job.json | cut -d, -f1", "base64"),
        ("docs/deployment.md", "docker build", "doker build", "doker is no program"),
        (
            "docs/development.md",
            "--workers 2 --volume",
            "--workers 2 --volumes",
            "no option --volumes",
        ),
        (
            "docs/development.md",
            "handler.py --rp_serve_api",
            "handle.py --rp_serve_api",
            "no file handle.py",
        ),
        (
            "docs/library-use.md",
            "lora.engine_for(",
            "lora.motor_for(",
            "has no attribute 'motor_for'",
        ),
        (
            "docs/library.md",
            "$LORA_CACHE_DIR/presets.json",
            "$LORA_CACHE_DIR/preset.json",
            "there is no",
        ),
        (
            "docs/library.md",
            '"prompt_prefix": "water',
            '"prompt_prefixes": "water',
            "prompt_prefixes",
        ),
        (
            "docs/requests.md",
            '"action": "loras.prefetch", "loras"',
            '"action": "loras.prefetch", "lora"',
            "lora",
        ),
        ("docs/requests.md", '"phase": "generating"', '"phase": "drawing"', "update.phase"),
        ("docs/requests.md", '"fraction": 0.4', '"fractions": 0.4', "fractions"),
        ("docs/requests.md", '"layers": 230', '"layers": 231', "layers: the page says 231"),
        ("docs/requests.md", '"used_keys": 690', '"used_key": 690', "the page has the fields"),
        ("docs/requests.md", '"denoise": 1.2', '"denoised": 1.2', "timings"),
        (
            "docs/sources.md",
            '"path": "nerijs/pixel-art-xl"',
            '"path": "nerijs/pixel-art-xxl"',
            "NOT_FOUND",
        ),
        (
            "docs/tools.md",
            "inspect demo/loras/demo-stripes.safetensors --against",
            "inspect demo/loras/demo-stripes.safetensors --agianst",
            "no option --agianst",
        ),
        ("docs/architecture.md", "[lora/tools:", "[lora/tool:", "there is no lora/tool"),
        (".runpod/README.md", '"seed": 1, "loras"', '"sed": 1, "loras"', "sed"),
        (
            ".runpod/README.md",
            '"status": "applied"',
            '"state": "applied"',
            "the page has the fields",
        ),
    ],
)
def test_what_is_broken_on_purpose_is_seen(
    pages: Pages, page: str, old: str, new: str, fault: str
) -> None:
    changed, number = broken(pages, page, old, new)
    with pytest.raises(Wrong) as caught:
        changed.check(number, first=max(0, number - (changed.blocks[number].language == "json")))
    assert fault in str(caught.value)
    changed.close()


@pytest.mark.parametrize(
    ("page", "old", "new"),
    [
        ("README.md", "`make bench-lora`", "`make bench-loras`"),
        ("docs/development.md", "`--scale-delay S`", "`--scale-delays S`"),
        ("docs/tools.md", "`--max-bytes 100M`", "`--max-byte 100M`"),
        (
            "docs/deployment.md",
            "`--build-arg WORKER_REFINER=none`",
            "`--build-arg WORKER_REFINE=none`",
        ),
    ],
)
def test_a_name_in_a_sentence_that_is_broken_is_seen(page: str, old: str, new: str) -> None:
    assert old in TEXTS[page], f"{page} has no {old} any more"
    text = TEXTS[page].replace(old, new)
    with pytest.raises(Wrong):
        look_up_variables(text)
        for code in spans(text):
            look_up_span(code)


@pytest.mark.parametrize(("number", "block"), CONSOLES, ids=[str(block) for _, block in CONSOLES])
def test_every_line_of_output_is_compared(number: int, block: Block, pages: Pages) -> None:
    """Each word of each line, changed alone, and each line left out is seen."""
    pages.of(block.page).check(number)
    for command, said in console(block.text):
        found = pages.of(block.page).printed[command]
        lines = said.splitlines()
        for at, line in enumerate(lines):
            for word in re.findall(r"[A-Za-z_]{3,}", line):
                changed = line.replace(word, word[::-1] + "x", 1)
                with pytest.raises(Wrong):
                    compare_text("\n".join([*lines[:at], changed, *lines[at + 1 :]]), found)
            with pytest.raises(Wrong):
                compare_text("\n".join([*lines[:at], *lines[at + 1 :]]), found)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("exactly this", "exactly that"),
        ("230 layers", "231 layers"),
        ("error 0.425", "error 0.475"),
        ("1.2 s", "soon"),
        ("one\ntwo", "one"),
        ("one", "one\ntwo"),
        ("one\n…\nthree", "one\ntwo"),
        ("4622157 of", "4722157 of"),
        ("sha256 3cf764ef", "sha256 3cf764ee"),
    ],
)
def test_another_output_is_seen(said: str, found: str) -> None:
    with pytest.raises(Wrong):
        compare_text(said, found)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("in 2.4 s", "in 13 s"),
        ("error 0.425", "error 0.4251"),
        ("one\n…\nthree", "one\ntwo\n2.5\nthree"),
        ("a … d", "a b c d"),
        ("a    b", "a b"),
        ("2026-11-21 16:29", "2027-01-01 00:00"),
        ("4622157 of", "4622158 of"),
    ],
)
def test_what_differs_from_run_to_run_is_no_other_output(said: str, found: str) -> None:
    compare_text(said, found)


@pytest.mark.parametrize(
    "text",
    [
        "```\nls\n```",
        "```ruby\nputs 1\n```",
        '```json\n{"a": 1}\n```',
        "```json\n[1]\n```",
        "```json\n{\n```",
    ],
)
def test_no_block_is_passed_over(pages: Pages, text: str) -> None:
    page = pages.new("docs/new.md", text)
    with pytest.raises(Wrong):
        page.check(0)


def test_a_block_that_does_not_end_is_told() -> None:
    with pytest.raises(Wrong, match="does not end"):
        blocks("docs/new.md", "```sh\nls\n")
