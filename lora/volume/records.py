"""Small JSON files of the cache: the record beside each adapter, and the sources' last answers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
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
    template: str | None = None
    """The text of the chat template that belongs to it."""
    opened_by: str | None = None
    """A hash of the signature, user or token in the link that it was fetched by; None if there was none."""
    before: Record | None = None
    """That of the file which this one's replaces: the record is written first, so either may be there."""

    def __post_init__(self) -> None:
        if isinstance(self.before, dict):  # as it was read
            object.__setattr__(self, "before", _made(Record, self.before))

    @property
    def asked(self) -> float | None:
        """When its source was last asked; None if it has none."""
        return self.fetched if self.checked is None else self.checked

    @property
    def origin_sha256(self) -> str:
        """The hash of the file as its source has it."""
        return self.source_sha256 or self.sha256

    @property
    def versions(self) -> tuple[Record, ...]:
        """This record and the one before, each alone."""
        alone = replace(self, before=None) if self.before else self
        return (alone, self.before) if self.before else (alone,)

    def of(self, size: int, mtime_ns: int) -> Record | None:
        """That of the two versions which had this size and time when it was hashed; None if neither had."""
        fitting = (one for one in self.versions if (one.size, one.mtime_ns) == (size, mtime_ns))
        return next(fitting, None)

    def at(self, status: os.stat_result) -> Record | None:
        """As `of`, for a file with this status."""
        return self.of(status.st_size, status.st_mtime_ns)


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
        return _made(kind, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _made(kind: type[Kind], values: dict[str, Any]) -> Kind:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})


def write(root: Path, path: Path, value: Any, *, synced: bool = False) -> None:
    """Writes a dataclass, whole or not at all. Raises: OSError.

    `synced`: it is on the disk before it has its name. Most need not wait for that.
    """
    folder = root / INCOMING
    folder.mkdir(parents=True, exist_ok=True)
    with published(path, folder, synced=synced) as part:
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
