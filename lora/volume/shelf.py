"""Adapter files as they lie in the cache's folders: names, records, and what is whole."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lora.errors import LoraCorrupt, LoraError, SourceInvalid
from lora.fetch.sources import RemoteFile
from lora.formats.endings import EXTENSIONS, SAFETENSORS
from lora.formats.header import read_header
from lora.formats.peft import STEMS
from lora.volume.mounts import on_local_disk
from lora.volume.records import INCOMING, Record, read_as, record_path, touch, write
from lora.volume.room import DAMAGED, adapter_files

log = logging.getLogger(__name__)

PATIENCE = (0.02, 0.1)
"""Seconds to wait while a record and its file do not fit: a worker may be between its two renames."""

DAMAGED_DAYS = 1.0
"""How long a damaged file is kept to be looked at."""


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
    """Whether its bytes may be used as they lie on the disk: a local one, and a file that only the cache
    writes, by renaming. An operator's file may be changed in place, and a volume's vanish."""
    warnings: tuple[str, ...] = ()


class Damaged(Exception):
    """A file that was downloaded whole has other bytes now; the text is a sentence for a person."""


class Shelf:
    """The volume's folder and, for when that cannot be written, another."""

    def __init__(self, root: Path, fallback: Path | None, stale_after: float) -> None:
        """`stale_after`: seconds without a write after which an unfinished file is a dead worker's."""
        self.root, self.fallback = root, fallback
        self._stale_after = stale_after
        self._local = {place: on_local_disk(place) for place in self.roots}
        self._trouble: str | None = None

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that files are looked for in, in this order."""
        return (self.root, self.fallback) if self.fallback else (self.root,)

    @property
    def trouble(self) -> str | None:
        """Why files go to the fallback, as long as they do."""
        return self._trouble

    def prepare(self) -> Path:
        """The folder that is written to: the volume if it can be, else the fallback, and a warning.

        Raises: OSError if nothing can be written.
        """
        for root in self.writable():
            return root
        raise OSError(errno.EROFS, "neither the volume nor this container's disk can be written")

    def writable(self) -> Iterator[Path]:
        """The folders that can be written, the volume first. What dead workers left there is removed."""
        for root in self.roots:
            try:
                _probe(root)
            except OSError as error:
                self.lost(root, error)
                continue
            if root == self.root:
                self._trouble = None
            _sweep(root, self._stale_after)
            yield root

    def lost(self, root: Path, error: OSError) -> None:
        """Takes note that a folder cannot be written."""
        words = f"the LoRA cache on the volume cannot be written ({error.strerror})"
        if root == self.root and self.fallback:
            words += "; LoRAs are kept on this container's disk"
            if self._trouble != words:
                log.warning("%s: %s", root, words)
            self._trouble = words

    def is_local(self, path: Path) -> bool:
        """Whether a file of the cache is on a disk of this machine."""
        return self._local[self.root_of(path)]

    def files(self) -> list[Path]:
        """Every adapter file in the cache, in the order of their names, the volume's first."""
        return [path for root in self.roots for path in adapter_files(root)]

    def existing(self, name: str) -> Path | None:
        """The file of this name; .safetensors before pickles, and what is written to before the other."""
        stems = (name, *(f"{name}/{stem}" for stem in STEMS))
        candidates = [name, *(stem + ext for stem in stems for ext in EXTENSIONS)]
        for root in self.roots:
            for candidate in candidates:
                path = root / candidate
                with suppress(OSError):
                    if candidate.endswith(EXTENSIONS) and path.is_file():
                        if not path.resolve().is_relative_to(root.resolve()):
                            raise SourceInvalid(f"{name!r} leads out of the LoRA cache")
                        return path
        return None

    def root_of(self, path: Path) -> Path:
        """The folder of the cache that a file is in."""
        return next(root for root in self.roots if path.is_relative_to(root))

    def entry(
        self, path: Path, *, downloaded: bool = False, source: str | None = None
    ) -> CacheEntry:
        """The file with its record; its use is noted. Raises: OSError, Damaged, LoraError."""
        root = self.root_of(path)
        record = self._record(root, path, source)
        mappable = record.fetched is not None and self._local[root]
        return CacheEntry(path, str(path.relative_to(root)), record, downloaded, mappable)

    def _record(self, root: Path, path: Path, source: str | None) -> Record:
        """The file's record; hashed anew if there is none or the file was changed since.

        Raises: Damaged if a downloaded file is not what it was; LoraError; OSError.
        """
        beside = record_path(path)
        for wait in (*PATIENCE, None):
            stat = path.stat()
            record = read_as(Record, beside)
            if record and (record.size, record.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                touch(beside)
                return record
            if record is None or record.fetched is None or wait is None:
                break
            time.sleep(wait)
        fetched = record is not None and record.fetched is not None
        trouble: LoraError | None = None
        sha256 = ""
        try:
            read_header(path)
            sha256 = sha256_of(path)
        except LoraError as error:
            trouble = error
        now = path.stat()
        same = (now.st_size, now.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        if not same or read_as(Record, beside) != record:
            return self._record(root, path, source)  # a worker published while it was hashed
        if record and fetched:
            if record.sha256 != sha256:
                raise _damaged(path) from trouble
            record = replace(record, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        elif trouble:
            raise trouble
        else:
            record = Record(source or path.name, sha256, stat.st_size, stat.st_mtime_ns, None)
        with suppress(OSError):  # a read-only volume: the next worker hashes it again
            write(root, beside, record)
        return record

    def kept(self, remote: RemoteFile) -> CacheEntry | None:
        """The source's file if it is here, and the one that is asked for; the newest, if there are two.

        Raises: Damaged if it was changed on the volume; then it is set aside, and is here no more.
        """
        name, damaged = file_name(remote), None
        found: list[CacheEntry] = []
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
            found.append(entry)
        if damaged and not found:
            raise damaged
        return max(found, key=lambda one: one.record.asked or 0.0, default=None)

    def is_damaged(self, entry: CacheEntry) -> bool:
        """Whether the file's bytes are not those that were hashed. Reads the whole file."""
        try:
            return sha256_of(entry.path) != entry.record.sha256
        except OSError:
            return True

    def verify(self) -> dict[str, bool]:
        """Every .safetensors file's name, and whether it is whole: of one that was downloaded, or that nobody
        wrote to since it was hashed, whether its bytes are those of its record.

        Reads every byte of the cache, and changes nothing.
        """
        found = {}
        for root in self.roots:
            for path in adapter_files(root):
                if path.suffix != SAFETENSORS:
                    continue
                record = read_as(Record, record_path(path))
                try:
                    read_header(path)
                    hashed = _must_be(path, record) if record else None
                    whole = not hashed or sha256_of(path) == hashed
                except (OSError, LoraError):
                    whole = False
                found[str(path.relative_to(root))] = whole
        return found

    def set_aside(self, path: Path) -> bool:
        """Takes a damaged file out of the readers' way, if the volume lets it; it is kept for a day."""
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


def _must_be(path: Path, record: Record) -> str | None:
    """The hash that the file must have; None if its owner may have put another one under its name."""
    about = path.stat()
    same = (about.st_size, about.st_mtime_ns) == (record.size, record.mtime_ns)
    return record.sha256 if same or record.fetched is not None else None


def _damaged(path: Path) -> Damaged:
    return Damaged(f"{path.name} was changed on the volume since it was fetched")


def _probe(root: Path) -> None:
    """Raises: OSError if the folder cannot be made or written."""
    folder = root / INCOMING
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"probe-{uuid.uuid4().hex}.part"
    probe.touch()
    probe.unlink()


def _sweep(root: Path, age: float) -> None:
    """Removes what dead workers left: parts and leases that nobody has written to for so many seconds."""
    for folder, oldest in ((INCOMING, age), (DAMAGED, DAMAGED_DAYS * 86_400)):
        with suppress(OSError):
            for path in (root / folder).iterdir():
                with suppress(OSError):  # another worker finished or swept it just now
                    if time.time() - path.stat().st_mtime > oldest:
                        path.unlink()


def digest_of(text: str) -> str:
    """16 hex digits that stand for a text in a file's name."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex, read in pieces. Raises: OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
