"""A page whose blocks are checked, in order: what they print is compared with what comes out."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from lora.volume.presets import read_config
from schemas import parse_job
from settings import STOCK_MODEL
from tests.conftest import ROOT
from tests.printed.blocks import COMMANDS, Block, Wrong, blocks, console
from tests.printed.clone import SERVES, Clone, replaced
from tests.printed.compare import compare_json, compare_text, parsed
from tests.printed.lookup import look_up_block
from tests.printed.world import World
from validation import InvalidInput

STOCK = STOCK_MODEL.split("/")[1]
SIZE = 64
"""The sides of the demo's pictures, whatever a request says: larger ones take minutes."""


class Page:
    """A page and its clone. Close it."""

    def __init__(self, name: str, text: str, folder: Path, world: World) -> None:
        self.blocks = blocks(name, text)
        self.came_out: dict[int, Any] = {}
        """What each block printed or answered, by its number, after its check."""
        self.printed: dict[str, str] = {}
        """What each command of a console printed."""
        self._faults: dict[int, Wrong | None] = {}
        self._folder, self._world = folder, world
        self.clone = Clone(folder, world)
        self._checks: dict[str, Callable[[int, Block], None]] = {
            "sh": self._shell,
            "console": self._console,
            "python": self._python,
            "js": self._node,
            "json": self._json,
            "text": self._text,
            "mermaid": self._names,
        }

    def check(self, number: int, first: int = 0) -> None:
        """Checks a block, and before it those from `first` on that were not checked yet. Raises: Wrong."""
        for above in range(first, number + 1):
            if above not in self._faults:
                try:
                    self._check(above)
                    self._faults[above] = None
                except Wrong as wrong:
                    self._faults[above] = wrong
        if fault := self._faults[number]:
            raise fault

    def close(self) -> None:
        self.clone.close()

    def _check(self, number: int) -> None:
        block = self.blocks[number]
        if block.language not in self._checks:
            raise Wrong(f"nothing checks a block of {block.language or 'no language'}")
        if block.language == "sh":
            look_up_block(block.text, run=not block.reason)
        if not block.reason:
            written = self.clone.root / block.writes if block.writes else None
            if written:
                written.unlink(missing_ok=True)
            self._checks[block.language](number, block)
            if written:
                _check_file(written)

    # --- commands -------------------------------------------------------------------------------

    def _shell(self, number: int, block: Block) -> None:
        if SERVES.search(block.text):
            self.clone.serve(block.text)
        else:
            self._ended(number, *self.clone.shell(block.text))

    def _console(self, number: int, block: Block) -> None:
        for command, said in console(block.text):
            look_up_block(command, run=True)
            code, printed = self.clone.shell(command)
            if bool(code) != said.startswith("error: "):
                raise Wrong(f"exit code {code} of {command}:\n{printed}")
            self.printed[command] = printed
            compare_text(said, printed)

    def _python(self, number: int, block: Block) -> None:
        well, printed = self.clone.python(block.text, str(block))
        self._ended(number, int(not well), printed)

    def _node(self, number: int, block: Block) -> None:
        self._ended(number, *self.clone.node(block.text))

    def _ended(self, number: int, code: int, printed: str) -> None:
        self.came_out[number] = printed
        if code:
            raise Wrong(f"exit code {code}:\n{printed}")

    # --- text -----------------------------------------------------------------------------------

    def _text(self, number: int, block: Block) -> None:
        above = self._above(number)
        if above and above.language in COMMANDS:
            if number - 1 not in self.came_out:
                raise Wrong("what the block above prints is not known")
            compare_text(block.text, self.came_out[number - 1])
            return
        for line in block.text.splitlines():
            for name in re.split(r" {2,}", line.strip())[0].split():
                self._look_for(name)

    def _above(self, number: int) -> Block | None:
        """The block above it under the same heading."""
        above = self.blocks[number - 1] if number else None
        return above if above and above.heading == self.blocks[number].heading else None

    def _look_for(self, name: str) -> None:
        folder = "$LORA_CACHE_DIR/"
        if not name.startswith(folder):
            there = (ROOT / name).exists()
        else:
            there = name.removeprefix(folder).rstrip("/") in self._world.kept
        if not there:
            raise Wrong(f"there is no {name}")

    def _names(self, number: int, block: Block) -> None:
        names = re.findall(r"\[([\w./]+)", block.text)
        for name in names:
            if name != "lora":
                self._look_for(name)

    # --- JSON -----------------------------------------------------------------------------------

    def _json(self, number: int, block: Block) -> None:
        value = parsed(block.text)
        given = parsed(replaced(block.text, self.clone.stand_ins(block.text)))
        above = self.came_out.get(number - 1)
        if not isinstance(value, dict):
            raise Wrong("a block of JSON is an object")
        if isinstance(value.get("input"), dict):
            self.came_out[number] = self._answer(given)
        elif value and all(isinstance(one, dict) and "loras" in one for one in value.values()):
            for name, preset in value.items():
                self._answer({"input": {"action": "presets.set", "name": name, **preset}})
        elif "phase" in value:
            _compare_update(value, self._world.updates)
        elif value.keys() & {"lora_path", "lora_configs"}:
            config = self._folder / "config.json"
            config.write_text(json.dumps(value))
            read_config(config)
        elif above is not None:
            found = parsed(above) if isinstance(above, str) else above
            if value.get("model") == STOCK:  # the demo's stands in for it
                found = {**found, "model": STOCK}
            compare_json(value, found, shortened=block.shortened)
        else:
            raise Wrong("nothing tells what this JSON is")

    def _answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the worker answers. Raises: Wrong if that is an error, or has warnings."""
        if "action" not in job["input"]:
            try:
                warnings = parse_job(job).warnings
            except InvalidInput as error:
                raise Wrong(str(error)) from None
            if warnings:
                raise Wrong(f"the request is taken with warnings: {warnings}")
            sides = {side: SIZE for side in ("width", "height") if side in job["input"]}
            job = {**job, "input": {**job["input"], **sides}}
        answer = self._world.worker({"id": f"job-{uuid.uuid4()}", **job})
        if "error" in answer or answer.get("warnings"):
            raise Wrong(str(answer.get("error") or answer["warnings"]))
        return dict(answer)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise Wrong(f"no {path.name} was written")
    if path.suffix == ".png":
        try:
            with Image.open(path) as picture:
                picture.load()
        except OSError as error:
            raise Wrong(f"{path.name}: {error}") from None


def _compare_update(said: dict[str, Any], updates: list[dict[str, Any]]) -> None:
    """Some update is like it, at whatever step."""

    def plain(update: dict[str, Any]) -> dict[str, Any]:
        text = re.sub(r"\d+", "0", str(update.get("text")))
        return {**update, "fraction": type(update.get("fraction")), "text": text}

    faults = []
    for update in updates:
        try:
            compare_json(plain(said), plain(update), at="the update")
            return
        except Wrong as wrong:
            faults.append(str(wrong))
    raise Wrong("; ".join(faults) or "there were no updates")
