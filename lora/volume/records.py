"""Small JSON files of the cache: the record beside each adapter, and the sources' last answers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lora.durable import published
from lora.errors import CacheFull

log = logging.getLogger(__name__)

INCOMING = ".incoming"
"""The folder for unfinished files, within the cache's root: a rename from there is atomic."""

DAMAGED = ".damaged"
"""The folder of files that were found changed on the volume."""


@dataclass(frozen=True)
class Record:
    """What the cache knows of an adapter file."""

    source: str
    """Where it came from, without secrets."""
    sha256: str
    size: int
    mtime_ns: int
    """The file's own time when it was hashed: a file with another time was changed."""
    fetched: float | None
    """When it was downloaded, in seconds since 1970; None for a file that was put here by hand."""
    checked: float | None = None
    """When its source last confirmed it."""
    etag: str | None = None
    modified: str | None = None
    """The source's Last-Modified."""
    source_sha256: str | None = None
    """The hash of the downloaded file, if that was converted."""
    config: str | None = None
    """The text of the adapter_config.json that belongs to it."""

    @property
    def asked(self) -> float | None:
        """When its source was last asked; None if it has none."""
        return self.fetched if self.checked is None else self.checked

    @property
    def origin_sha256(self) -> str:
        """The hash of the file as its source has it."""
        return self.source_sha256 or self.sha256

    def fits(self, status: os.stat_result) -> bool:
        """Whether the file still has the size and time that it had when it was hashed."""
        return (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)


Kind = TypeVar("Kind")


def record_path(path: Path) -> Path:
    """Where the record of an adapter file lies."""
    return path.with_name(path.name + ".json")


def pin_path(path: Path) -> Path:
    """The file whose presence keeps an adapter file from being evicted."""
    return path.with_name(path.name + ".pin")


def read_as(kind: type[Kind], path: Path) -> Kind | None:
    """A dataclass that `write` wrote, without the fields that a newer version added; None if unreadable."""
    try:
        values = json.loads(path.read_text())
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        return kind(**{name: value for name, value in values.items() if name in names})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write(root: Path, path: Path, value: Any) -> None:
    """Writes a dataclass, whole or not at all, without waiting for the disk. Raises: OSError."""
    folder = root / INCOMING
    folder.mkdir(parents=True, exist_ok=True)
    with published(path, folder, synced=False) as part:
        part.write_text(json.dumps(asdict(value), indent=1))
        path.parent.mkdir(parents=True, exist_ok=True)


def touch(path: Path) -> None:
    """Notes a use: the record's time is that of the last use."""
    try:
        os.utime(path)
    except OSError as error:  # a read-only volume: only the order of eviction suffers
        log.debug("cannot note the use of %s: %s", path.name, error.strerror)


@contextmanager
def write_errors_as(sentence: str, hint: str = "") -> Iterator[None]:
    """Turns an OSError of the block into CacheFull with this sentence and the system's reason."""
    try:
        yield
    except OSError as error:
        raise CacheFull(f"{sentence} ({error.strerror})", hint) from error
