"""What the cache writes down: a record beside each adapter, and what sources answered lately."""

from __future__ import annotations

import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

INCOMING = ".incoming"
"""The folder for what is not whole yet, within the cache's root: a rename from there is atomic."""


@dataclass(frozen=True)
class Record:
    """What the cache knows of an adapter file."""

    source: str
    """Where it came from, as it may be shown."""
    sha256: str
    size: int
    mtime_ns: int
    """The adapter file's own time when it was hashed: another time means another file."""
    fetched: float | None
    """When it was downloaded, in seconds since 1970; None for a file that was put here by hand."""
    checked: float | None = None
    """When its source last said that this is still the one."""
    etag: str | None = None
    modified: str | None = None
    """The source's Last-Modified."""
    source_sha256: str | None = None
    """The hash of what was downloaded, where that was converted."""
    config: str | None = None
    """The text of the adapter_config.json that belongs to it."""

    @property
    def asked(self) -> float | None:
        """When its source was asked last; None for a file without one."""
        return self.fetched if self.checked is None else self.checked

    @property
    def origin_sha256(self) -> str:
        """The hash that whoever names the source knows."""
        return self.source_sha256 or self.sha256


Kind = TypeVar("Kind")


def record_path(path: Path) -> Path:
    """Where the record of an adapter file lies."""
    return path.with_name(path.name + ".json")


def pin_path(path: Path) -> Path:
    """What keeps an adapter file from being evicted, if it is there."""
    return path.with_name(path.name + ".pin")


def read_as(kind: type[Kind], path: Path) -> Kind | None:
    """A dataclass that `write` wrote; None if there is none, or none that can be read.

    What a newer version added is left out.
    """
    try:
        values = json.loads(path.read_text())
        known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
        return kind(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def told_of(root: Path, path: Path) -> dict[str, Any] | None:
    """An adapter file as lists tell it, times in seconds since 1970; None if it was evicted just now."""
    beside = record_path(path)
    record = read_as(Record, beside)
    try:
        return {
            "name": str(path.relative_to(root)),
            "bytes": path.stat().st_size,
            "source": record.source if record else None,
            "sha256": record.sha256 if record else None,
            "downloaded": record.fetched if record else None,
            "used": beside.stat().st_mtime if record else None,
            "pinned": pin_path(path).exists(),
        }
    except OSError:
        return None


def write(root: Path, path: Path, value: Any) -> None:
    """Writes a dataclass, whole or not at all. Raises: OSError."""
    folder = root / INCOMING
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{uuid.uuid4().hex}.part"
    try:
        part.write_text(json.dumps(asdict(value), indent=1))
        path.parent.mkdir(parents=True, exist_ok=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def touch(path: Path) -> None:
    """Notes a use: the record's time is the last one."""
    try:
        os.utime(path)
    except OSError as error:  # a read-only volume: only the order of eviction suffers
        log.debug("cannot note the use of %s: %s", path.name, error.strerror)
