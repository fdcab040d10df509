"""A user's own adapter files, named by their paths, which a job cannot do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora.errors import LoraNotFound, ToolError
from lora.fetch.sources import Reference
from lora.formats.endings import EXTENSIONS
from lora.formats.opening import file_of, load_file
from lora.volume.loader import Loaded, LoraLibrary
from lora.volume.records import Record
from lora.volume.shelf import CacheEntry


def own_file(source: str) -> Path | None:
    """The adapter's file if the source is a path on this machine; None if it is another kind of source.

    Raises: LoraNotFound if nothing is there, ToolError if it is no adapter file.
    """
    path = Path(source)
    with suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if path.is_dir():
        path = file_of(path)
    if not path.is_file():
        if source.startswith(("/", "./", "../", "~")):
            raise LoraNotFound(f"there is no file {source}")
        return None
    if path.suffix not in EXTENSIONS:
        raise ToolError(f"{path} is no adapter file", f"Its name ends in {', '.join(EXTENSIONS)}.")
    return path


class OwnFiles(LoraLibrary):
    """Reads paths where they lie, without touching them; takes everything else as a job does."""

    def load_all(self, references: Sequence[Reference], report: Any = None) -> list[Loaded]:
        """As `LoraLibrary.load_all`, one after the other."""
        return [
            self._own(reference, path)
            if (path := own_file(reference.path))
            else self.load(reference)
            for reference in references
        ]

    def _own(self, reference: Reference, path: Path) -> Loaded:
        begun = time.perf_counter()
        file = load_file(path, self._key_map)
        status = path.stat()
        record = Record(path.name, file.sha256, status.st_size, status.st_mtime_ns, None)
        entry = CacheEntry(path, path.name, record, downloaded=False, mappable=False)
        return Loaded(reference, entry, file, 0.0, 0.0, time.perf_counter() - begun)
