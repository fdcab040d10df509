"""What the pages print: the blocks of code in README and docs, and what each is.

A fenced block is one of these:

- `sh`: commands, run in a terminal that a reader opens in the clone, one for the whole page.
- `console`: the same with `$ ` before each command, and its output after it.
- `python`: one session for the whole page. `js`: one program for each block.
- `json`: a request; or what the block above answers; or a preset, an update of progress, a config file.
- `text`: what the block above prints; or names of files. `mermaid`: names of packages.

A comment just above a block says what cannot be seen, such as `<!-- printed: not run: needs Docker -->`:

- `not run: REASON`: its programs, flags and files are looked up; see `REASONS`.
- `writes FILE`: a file that must be there afterwards, written by this block; a picture must be one.
- `shortened`: a JSON answer with fields left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.conftest import ROOT

PAGES = (
    "README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
    "CONTRIBUTING.md",
    "SECURITY.md",
    ".runpod/README.md",
)
COMMANDS = ("sh", "console", "python", "js")
"""Languages of what is run."""
NOT_RUN, WRITES = "not run: ", "writes "
REASONS = {
    "needs Docker",
    "needs a GPU",
    "needs a RunPod account",
    "needs weights of full size",
    "sets up the machine",
    "takes minutes",
}
"""Why a block may stay unrun."""


class Wrong(AssertionError):
    """What is printed is not what comes out."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, its first line's number, the comment and the heading above it."""

    page: str
    line: int
    language: str
    text: str
    mark: str
    heading: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def reason(self) -> str:
        """Why it is not run; empty if it is."""
        return self.mark.removeprefix(NOT_RUN) if self.mark.startswith(NOT_RUN) else ""

    @property
    def writes(self) -> str:
        """The file that it says it writes; empty if it says none."""
        return self.mark.removeprefix(WRITES) if self.mark.startswith(WRITES) else ""

    @property
    def shortened(self) -> bool:
        return self.mark == "shortened"


def blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page, in order. Raises: Wrong if a fence is left open."""
    found: list[Block] = []
    mark, heading, fence, start = "", "", None, 0
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        opening = re.match(r"( *)(`{3,})(.*)$", line)
        if fence and line.strip() == fence[2]:
            body = "\n".join(row.removeprefix(fence[1]) for row in inside)
            found.append(Block(page, start, fence[3].strip(), body, mark, heading))
            fence, mark = None, ""
        elif fence:
            inside.append(line)
        elif opening:
            fence, start, inside = opening, number + 1, []
        elif line.strip():
            comment = re.fullmatch(r"<!-- printed: (.*) -->", line.strip())
            mark = comment[1] if comment else ""
            heading = line if line.startswith("#") else heading
    if fence:
        raise Wrong(f"{page}:{start}: this block does not end")
    return found


def spans(text: str) -> Iterator[str]:
    """The pieces of code within a page's sentences."""
    prose = re.sub(r"^ *(`{3,}).*?^ *\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(found.split()) for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))


def console(text: str) -> list[tuple[str, str]]:
    """The commands of a block with what is said to come out of each."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    if parts[0].strip() or len(parts) == 1:
        raise Wrong("a block of `console` begins with `$ ` and a command")
    found = []
    for part in parts[1:]:
        command, *output = re.split(r"(?<!\\)\n", part, maxsplit=1)
        found.append((command, "\n".join(output).strip("\n")))
    return found
