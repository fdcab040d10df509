"""Adapter files in the cache's folders with their records: what is whole, and what was changed."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lora.durable import sha256_of
from lora.errors import LoraCorrupt, LoraError
from lora.fetch.sources import RemoteFile
from lora.formats.endings import SAFETENSORS
from lora.formats.header import read_header
from lora.volume.adapters import StoredAdapter
from lora.volume.folders import Folders
from lora.volume.records import DAMAGED, Record, read_as, record_path, touch, write

log = logging.getLogger(__name__)

PATIENCE = (0.02, 0.1)
"""Seconds to wait while a record and its file do not fit: a worker may be between its two renames."""


@dataclass(frozen=True)
class CacheEntry:
    """One adapter file that is whole and on the disk."""

    path: Path
    name: str
    """The path relative to the cache's root, as a request would name it."""
    record: Record
    downloaded: bool
    """True where this call fetched it, False where it was there already."""
    mappable: bool
    """Whether its bytes may be used as they lie on the disk: the disk is local, and only the cache writes
    the file, by renaming. An operator's file may be changed in place, and a volume's vanish."""
    warnings: tuple[str, ...] = ()

    def warned(self, *warnings: str) -> CacheEntry:
        """The entry with these warnings before its own."""
        return replace(self, warnings=(*warnings, *self.warnings))


class Damaged(Exception):
    """A file that was downloaded whole has other bytes now; the text is a sentence for a person."""


class Shelf(Folders):
    """The cache's folders, and the record of each file in them."""

    def entry(
        self, path: Path, *, downloaded: bool = False, source: str | None = None
    ) -> CacheEntry:
        """The file with its record; its use is noted. Raises: OSError, Damaged, LoraError."""
        record = self._record(path, source)
        mappable = record.fetched is not None and self.is_local(path)
        return CacheEntry(path, self.name_of(path), record, downloaded, mappable)

    def _record(self, path: Path, source: str | None) -> Record:
        """The file's record; hashed anew if there is none or the file was changed since.

        Raises: Damaged if a downloaded file is not what it was; LoraError; OSError.
        """
        beside = record_path(path)
        for wait in (*PATIENCE, None):
            status = path.stat()
            record = read_as(Record, beside)
            if record and record.fits(status):
                touch(beside)
                return record
            if record is None or record.fetched is None or wait is None:
                break
            time.sleep(wait)
        sha256, fault = _hashed(path)
        now = path.stat()
        same = (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        if not same or read_as(Record, beside) != record:
            return self._record(path, source)  # a worker published while it was hashed
        if record and record.fetched is not None:
            if record.sha256 != sha256:
                raise Damaged(
                    f"{path.name} was changed on the volume since it was fetched"
                ) from fault
            record = replace(record, size=status.st_size, mtime_ns=status.st_mtime_ns)
        elif fault:
            raise fault
        else:
            record = Record(source or path.name, sha256, status.st_size, status.st_mtime_ns, None)
        with suppress(OSError):  # a read-only volume: the next worker hashes it again
            write(self.root_of(path), beside, record)
        return record

    def kept(self, remote: RemoteFile) -> CacheEntry | None:
        """The source's file if it is here and has the hash that is asked for; the newest, if there are two.

        Raises: Damaged if it was changed on the volume; then it was set aside, and is not here any more.
        """
        name, damaged = file_name(remote), None
        entries: list[CacheEntry] = []
        for root in self.roots:
            try:
                entry = self.entry(root / name, source=remote.shown)
                check_sha256(remote.sha256, entry.record.origin_sha256, remote.shown)
            except OSError:
                continue
            except Damaged as error:
                self.set_aside(root / name)
                damaged = error
                continue
            except LoraError as error:
                log.warning("%s is fetched again: %s", name, error.sentence)
                continue
            entries.append(entry)
        if damaged and not entries:
            raise damaged
        return max(entries, key=lambda entry: entry.record.asked or 0.0, default=None)

    def describe(self) -> list[dict[str, Any]]:
        """Every adapter file as lists show it, in the order of their names; times in seconds since 1970."""
        return [_described(adapter) for adapter in self.adapters()]

    def verify(self) -> dict[str, bool]:
        """The name of every .safetensors file, and whether it is whole.

        Where it was downloaded, or nobody wrote to it since it was hashed, its bytes must be those of its
        record. Reads every byte of the cache, and changes nothing.
        """
        paths = [path for path in self.files() if path.suffix == SAFETENSORS]
        return {self.name_of(path): _is_whole(path) for path in paths}

    def is_damaged(self, entry: CacheEntry) -> bool:
        """Whether the file's bytes are not those that were hashed. Reads the whole file."""
        try:
            return sha256_of(entry.path) != entry.record.sha256
        except OSError:
            return True

    def set_aside(self, path: Path) -> bool:
        """Moves a damaged file to where nobody reads it, if the volume allows that; it is kept for a day."""
        target = self.root_of(path) / DAMAGED / f"{path.name}.{uuid.uuid4().hex[:8]}"
        log.warning("%s is damaged and is set aside", path.name)
        try:
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
            os.utime(target)
        except OSError as error:
            log.warning("%s cannot be set aside: %s", path.name, error.strerror)
            return False
        return True


def _hashed(path: Path) -> tuple[str, LoraError | None]:
    """The sha256 of an adapter file, or what is wrong with the file. Raises: OSError."""
    try:
        read_header(path)
        return sha256_of(path), None
    except LoraError as error:
        return "", error


def _is_whole(path: Path) -> bool:
    record = read_as(Record, record_path(path))
    try:
        read_header(path)
        # An operator may have put another file under the name of one that has a record.
        known = record and (record.fetched is not None or record.fits(path.stat()))
        return not (record and known) or sha256_of(path) == record.sha256
    except (OSError, LoraError):
        return False


def _described(adapter: StoredAdapter) -> dict[str, Any]:
    beside, used = record_path(adapter.root / str(adapter.weights)), None
    record = read_as(Record, beside)
    with suppress(OSError):  # evicted just now
        used = beside.stat().st_mtime if record else None
    return {
        "name": adapter.weights,
        "bytes": adapter.version.size,
        "source": record.source if record else None,
        "sha256": record.sha256 if record else None,
        "downloaded": record.fetched if record else None,
        "used": used,
        "pinned": adapter.pinned,
    }


def digest_of(text: str) -> str:
    """16 hex digits that stand for a text in a file's name."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_sha256(expected: str | None, actual: str, shown: str) -> None:
    """Raises: LoraCorrupt if a hash was expected, and it is not this one."""
    if expected and expected.lower() != actual:
        raise LoraCorrupt(
            f"{shown} has the sha256 {actual[:12]}…, not the {expected[:12]}… that was asked for"
        )


def file_name(remote: RemoteFile) -> str:
    """What a source's file is called in the cache: the same on every worker and in every run."""
    name = PurePosixPath(remote.file_name)
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", name.stem).strip("._")[:80] or "lora"
    return f"{stem}-{digest_of(remote.identity)}{SAFETENSORS}"
