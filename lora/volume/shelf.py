"""Adapter files in the cache's folders with their records: published, found, and checked for changes."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lora.durable import part_file, replace_durably, sha256_of
from lora.errors import LoraCorrupt, LoraError, naming
from lora.fetch.download import Fetched, Limits
from lora.fetch.sources import RemoteFile
from lora.formats.apart import convert_apart
from lora.formats.endings import SAFETENSORS
from lora.formats.header import read_header
from lora.formats.peft import Beside, beside
from lora.formats.pickles import looks_like_pickle
from lora.volume.adapters import StoredAdapter
from lora.volume.folders import Folders
from lora.volume.records import DAMAGED, INCOMING, Record, read_as, record_path, touch, write
from lora.volume.room import Room
from lora.volume.versions import grows, hash_of, known, stamped

log = logging.getLogger(__name__)

PATIENCE = (0.02, 0.1)
"""Seconds to wait while a record does not fit its file: a worker may be between its two renames."""


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

    def __init__(self, root: Path, fallback: Path | None, limits: Limits) -> None:
        super().__init__(root, fallback, stale_after=2 * limits.timeout)
        self.limits, self.room = limits, Room(limits.total_bytes)

    def entry(self, path: Path, source: str | None = None) -> CacheEntry:
        """The file with its record; its use is noted. Raises: OSError, Damaged, LoraError."""
        record = self._record(path, source)
        mappable = record.fetched is not None and self.is_local(path)
        return CacheEntry(path, self.name_of(path), record, False, mappable)

    def _record(self, path: Path, source: str | None) -> Record:
        """The file's record. The file is hashed anew if it has none, or was changed since.

        Raises: Damaged if a downloaded file has other bytes now; LoraError; OSError.
        """
        beside = record_path(path)
        for wait in (*PATIENCE, None):
            status = first = path.stat()
            record = read_as(Record, beside)
            if record and (current := record.at(status)):
                touch(beside)
                return current
            if record is None or record.fetched is None or wait is None:
                break
            time.sleep(wait)
        sha256, fault = hash_of(path)
        if fault and grows(path, first):
            sentence = f"{path.name} still grows: it is being copied"
            raise LoraCorrupt(sentence, "Ask for it again when it is whole.") from fault
        hashed = Record(source or path.name, sha256, status.st_size, status.st_mtime_ns, None)
        if not hashed.at(path.stat()) or read_as(Record, beside) != record:
            return self._record(path, source)  # a worker published while it was hashed
        if record and record.fetched is not None:
            known = next((one for one in record.versions if one.sha256 == sha256), None)
            if known is None:
                text = f"{path.name} was changed on the volume since it was fetched"
                raise Damaged(text) from fault
            hashed = replace(known, size=hashed.size, mtime_ns=hashed.mtime_ns)
        elif fault:
            raise fault
        with suppress(OSError):  # a read-only volume: the next worker hashes it again
            if self.is_own(path):
                write(self.root_of(path), beside, hashed)
        return hashed

    def kept(self, remote: RemoteFile) -> CacheEntry | None:
        """The source's file if it is here and has the hash that is asked for; of two, the newer one.

        Raises: Damaged if it was changed on the volume; then it was set aside, and is not here any more.
        """
        name, damaged = file_name(remote), None
        entries: list[CacheEntry] = []
        for root in self.roots:
            try:
                entry = self.entry(root / name, remote.shown)
                check_sha256(remote.sha256, entry.record.origin_sha256, remote.shown)
                entries.append(entry)
            except OSError:
                pass  # it is not in this folder
            except Damaged as error:
                self.set_aside(root / name)
                damaged = error
            except LoraError as error:
                log.warning("%s is fetched again: %s", name, error.sentence)
        if damaged and not entries:
            raise damaged
        return max(entries, key=lambda entry: entry.record.asked or 0.0, default=None)

    def publish(
        self, part: Path, root: Path, remote: RemoteFile, fetched: Fetched, beside: Beside
    ) -> CacheEntry:
        """Checks the bytes of `part`, converts a pickle, and gives the file its name in `root`.

        The record appears first, so that a file with a record is never taken for an operator's, and it names
        the file that is there, too: if this ends between the two, that one serves on.
        Raises: LoraError, OSError; then nothing new lies under the name.
        """
        check_sha256(remote.sha256, fetched.sha256, remote.shown)
        path, sha256 = root / file_name(remote), fetched.sha256
        with naming(remote.shown), part_file(root / INCOMING, path.name) as converted:
            if looks_like_pickle(part):
                convert_apart(part, converted, self.limits.file_bytes)
                part, sha256 = converted, sha256_of(converted)
            read_header(part)
            before = known(path)
            status = stamped(part, sha256, before)
            # Again, because not every server says the size first.
            self.room.make(root, status.st_size, 0, path)
            now = time.time()
            record = Record(
                source=remote.shown,
                sha256=sha256,
                size=status.st_size,
                mtime_ns=status.st_mtime_ns,
                fetched=now,
                checked=now,
                etag=fetched.etag,
                modified=fetched.modified,
                source_sha256=fetched.sha256 if sha256 != fetched.sha256 else None,
                config=beside.config,
                template=beside.template,
                opened_by=opened_by(remote),
            )
            write(root, record_path(path), replace(record, before=before), synced=True)
            replace_durably(part, path)
        return CacheEntry(path, path.name, record, True, self.is_local(path))

    def converted(self, path: Path) -> CacheEntry:
        """An operator's pickle as .safetensors, written once per version. Raises: LoraError, OSError."""
        status, name = path.stat(), self.name_of(path)
        identity = f"file:{name}:{status.st_size}:{status.st_mtime_ns}"
        remote = RemoteFile("", identity, name, path.name, fixed=True)
        with suppress(Damaged):
            if kept := self.kept(remote):
                return kept
        root = self.prepare()
        with part_file(root / INCOMING, path.name) as part:
            shutil.copyfile(path, part)
            fetched = Fetched(sha256_of(part), status.st_size, None, None)
            return self.publish(part, root, remote, fetched, beside(path))

    def describe(self) -> list[dict[str, Any]]:
        """Every adapter file as lists show it, in the order of their names; times in seconds since 1970."""
        return [_described(adapter) for adapter in self.adapters()]

    def verify(self) -> dict[str, bool]:
        """The name of every .safetensors file, and whether it is whole.

        A file that was downloaded, or not changed since it was hashed, must have the bytes of its record.
        Reads every byte of the cache, and changes nothing.
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


def _is_whole(path: Path) -> bool:
    record = read_as(Record, record_path(path))
    try:
        read_header(path)
        if record is None or (record.fetched is None and not record.at(path.stat())):
            return True  # an operator put another file under the name of one that has a record
        return sha256_of(path) in {one.sha256 for one in record.versions}
    except (OSError, LoraError):
        return False


def _described(adapter: StoredAdapter) -> dict[str, Any]:
    beside, used = record_path(adapter.root / str(adapter.weights)), None
    record = read_as(Record, beside)
    record = record and (record.of(*adapter.version[:2]) or record)
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


def opened_by(remote: RemoteFile) -> str | None:
    """What stands in a record for the credentials that the request's link names; None if it names none."""
    return remote.credential and digest_of(remote.credential)


def check_sha256(expected: str | None, actual: str, shown: str) -> None:
    """Raises: LoraCorrupt if a hash was expected, and it is not this one."""
    if expected and expected.lower() != actual:
        raise LoraCorrupt(
            f"{shown} has the sha256 {actual[:12]}…, not the {expected[:12]}… that was asked for"
        )


def file_name(remote: RemoteFile) -> str:
    """The name of a source's file in the cache: the same on every worker and in every run."""
    name = PurePosixPath(remote.file_name)
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", name.stem).strip("._")[:80] or "lora"
    return f"{stem}-{digest_of(remote.identity)}{SAFETENSORS}"
