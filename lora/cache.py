"""The cache of adapter files on a volume that many workers share.

    <root>/NAME.safetensors        an adapter; NAME = <readable stem>-<16 hex of sha256(source)>
    <root>/NAME.safetensors.json   its record; its mtime is the last use
    <root>/.incoming/*.part        downloads under way

A file appears under its name whole, checked and at once (`rename`), so a reader needs no lock and
never sees half of one. Files that an operator puts there by hand are served too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from weakref import WeakValueDictionary

import requests

from lora.download import open_url
from lora.errors import (
    AccessDenied,
    CacheFull,
    DownloadFailed,
    LoraCorrupt,
    LoraError,
    LoraNotFound,
    LoraTooLarge,
    SourceInvalid,
    nearest,
)
from lora.header import read_header
from lora.mounts import on_local_disk
from lora.sources import EXTENSIONS, CachedName, Hub, HubFile, Reference, RemoteFile, parse

log = logging.getLogger(__name__)

STALE_AFTER = 3600.0
"""Seconds without a write after which a download under way counts as left over by a dead worker."""

FALLBACK_ROOT = Path(tempfile.gettempdir()) / "loras"
"""Where LoRAs are kept when the volume cannot be written."""

Progress = Callable[[int, int | None], None]
"""Called with (bytes so far, total or None) while a file comes in."""


@dataclass(frozen=True)
class Record:
    """What the cache knows of a file, as kept beside it."""

    source: str
    sha256: str
    size: int
    mtime_ns: int
    """The adapter file's own time when it was hashed: another time means another file."""
    fetched: float | None
    """When it was downloaded, in seconds since 1970; None for a file that was put here by hand."""


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


@dataclass(frozen=True)
class Limits:
    """How much the cache may take, in bytes and seconds. None means no limit."""

    file_bytes: int = 2 << 30
    total_bytes: int | None = None
    timeout: float = 300.0
    """Seconds that one whole download may take."""
    stall: float = 30.0
    """Seconds that a connection may stay silent."""
    tries: int = 3


class VolumeCache:
    """Adapter files by source, on a folder that may be shared with other workers.

    Threads of one worker that ask for the same source share one download. Two workers may both
    download it; each publishes by atomic rename, so the outcome is right in either order.
    """

    def __init__(self, root: Path, limits: Limits | None = None, hub: Hub | None = None) -> None:
        self.root = root
        self.limits = limits or Limits()
        self._hub = hub or Hub()
        self._local = on_local_disk(root)
        self._incoming = root / ".incoming"
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._in_use: dict[Path, int] = {}

    def prepare(self) -> None:
        """Makes the folders, proves that they can be written, and removes what dead workers left.

        Raises: OSError if the volume cannot be written.
        """
        self._incoming.mkdir(parents=True, exist_ok=True)
        probe = self._incoming / f"probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
        for part in self._incoming.iterdir():
            with suppress(FileNotFoundError):  # another worker finished or swept it just now
                if time.time() - part.stat().st_mtime > STALE_AFTER:
                    part.unlink()

    def resolve(self, reference: Reference) -> RemoteFile | CachedName:
        """Where the reference's file is: in the cache by name, or at a URL.

        Asks the hub if it must, downloads nothing. Raises: LoraError.
        """
        place = parse(reference)
        if isinstance(place, HubFile):
            asks_for_more = reference.weight_name or reference.revision
            if not asks_for_more and self._existing(reference.path):
                return CachedName(reference.path, reference.sha256)
            return self._hub.ask(place, reference.sha256)
        return place

    def get(self, place: RemoteFile | CachedName, progress: Progress | None = None) -> CacheEntry:
        """The whole and checked file of a place that `resolve` found. Raises: LoraError."""
        if isinstance(place, CachedName):
            return self.find(place)
        return self.fetch(place, progress)

    # --- looking ---------------------------------------------------------------------------------

    def path_for(self, remote: RemoteFile) -> Path:
        """Where this source's file is, or will be: the same on every worker and in every run."""
        digest = hashlib.sha256(remote.identity.encode()).hexdigest()[:16]
        name = PurePosixPath(remote.file_name)
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", name.stem).strip("._")[:80] or "lora"
        return self.root / f"{stem}-{digest}{EXTENSIONS[0]}"

    def find(self, cached: CachedName) -> CacheEntry:
        """The file of this name, with or without its extension; its use is noted.

        Raises: LoraNotFound, with the nearest names; SourceInvalid if the name, or a link in it, leads
        out of the cache.
        """
        path = self._existing(cached.name)
        if path is None:
            names = [str(p.relative_to(self.root)) for p in self.files()]
            stems = [name.removesuffix(EXTENSIONS[0]) for name in names]
            by_stem = nearest(cached.name.removesuffix(EXTENSIONS[0]), stems)
            hint = by_stem or f"The cache holds {len(names)} files."
            raise LoraNotFound(f"the cache has no file {cached.name!r}", hint)
        entry = self._entry(path, downloaded=False)
        _check_sha256(cached.sha256, entry.record.sha256, entry.name)
        return entry

    def files(self) -> list[Path]:
        """Every adapter file in the cache, in the order of their names."""
        found = [p for ext in EXTENSIONS for p in self.root.rglob(f"*{ext}") if p.is_file()]
        return sorted(p for p in found if ".incoming" not in p.parts)

    def _existing(self, name: str) -> Path | None:
        for candidate in (name, *(name + ext for ext in EXTENSIONS)):
            path = self.root / candidate
            if candidate.endswith(EXTENSIONS) and path.is_file():
                if not path.resolve().is_relative_to(self.root.resolve()):
                    raise SourceInvalid(f"{name!r} leads out of the LoRA cache")
                return path
        return None

    def _entry(self, path: Path, *, downloaded: bool, source: str | None = None) -> CacheEntry:
        record = self._record(path, source)
        name = str(path.relative_to(self.root))
        ours = record.fetched is not None
        return CacheEntry(path, name, record, downloaded, mappable=ours and self._local)

    def _record(self, path: Path, source: str | None) -> Record:
        """The file's record; hashed anew if there is none or the file was changed by hand."""
        beside = record_path(path)
        stat = path.stat()
        try:
            record = Record(**json.loads(beside.read_text()))
        except (OSError, ValueError, TypeError):
            record = None
        if record and (record.size, record.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            self._touch(beside)
            return record
        read_header(path)
        record = Record(
            source=source or path.name,
            sha256=sha256_of(path),
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            fetched=None,
        )
        try:
            self._write_json(beside, asdict(record))
        except OSError as error:
            log.warning("cannot write the record of %s: %s", path.name, error.strerror)
        return record

    @staticmethod
    def _touch(path: Path) -> None:
        try:
            os.utime(path)
        except OSError as error:  # a read-only volume: only the order of eviction suffers
            log.debug("cannot note the use of %s: %s", path.name, error.strerror)

    def _write_json(self, path: Path, value: dict[str, Any]) -> None:
        part = self._incoming / f"{uuid.uuid4().hex}.part"
        self._incoming.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(value, indent=1))
        part.replace(path)

    # --- fetching --------------------------------------------------------------------------------

    def fetch(self, remote: RemoteFile, progress: Progress | None = None) -> CacheEntry:
        """The source's file, downloaded unless it is there already.

        Whatever fails, nothing appears under the file's name and no temporary file stays.
        Raises: LoraNotFound, AccessDenied, DownloadFailed, LoraTooLarge, LoraCorrupt, CacheFull.
        """
        path = self.path_for(remote)
        with self._only_one(path.name):
            entry = self._kept(path, remote)
            if entry is None:
                if remote.size:
                    self._check_size(remote.size, remote)
                self._download(remote, path, progress or (lambda done, total: None))
                entry = self._entry(path, downloaded=True, source=remote.shown)
        return entry

    def _kept(self, path: Path, remote: RemoteFile) -> CacheEntry | None:
        """The source's file if it is here, whole, and the one that is asked for."""
        try:
            entry = self._entry(path, downloaded=False, source=remote.shown)
            _check_sha256(remote.sha256, entry.record.sha256, remote.shown)
        except FileNotFoundError:
            return None
        except LoraError as error:
            log.warning("%s is fetched again: %s", path.name, error.sentence)
            return None
        return entry

    @contextmanager
    def in_use(self, path: Path) -> Iterator[None]:
        """Keeps a file from being evicted by this worker while the block runs."""
        with self._guard:
            self._in_use[path] = self._in_use.get(path, 0) + 1
        try:
            yield
        finally:
            with self._guard:
                self._in_use[path] -= 1
                if not self._in_use[path]:
                    del self._in_use[path]

    @contextmanager
    def _only_one(self, name: str) -> Iterator[None]:
        """One thread at a time per file; the others find it there when their turn comes."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield

    def _download(self, remote: RemoteFile, path: Path, progress: Progress) -> None:
        deadline = time.monotonic() + self.limits.timeout
        self._incoming.mkdir(parents=True, exist_ok=True)
        part = self._incoming / f"{path.stem[:60]}-{uuid.uuid4().hex}.part"
        try:
            for attempt in range(1, self.limits.tries + 1):
                try:
                    digest = self._stream(remote, part, progress, deadline)
                    break
                except requests.RequestException as error:
                    # Only the kind of error: its text holds the whole URL, tokens and all.
                    kind = _kind(error)
                    log.warning("%s: %s (try %d)", remote.shown, kind, attempt)
                    pause = 0.5 * 2 ** (attempt - 1)
                    if attempt == self.limits.tries or time.monotonic() + pause > deadline:
                        words = f"{remote.shown} could not be downloaded ({kind})"
                        raise DownloadFailed(words, "Try again later.") from None
                    time.sleep(pause)
            self._publish(remote, part, path, digest)
        except OSError as error:
            raise CacheFull(f"the LoRA cache cannot be written ({error.strerror})") from error
        finally:
            part.unlink(missing_ok=True)

    def _stream(self, remote: RemoteFile, part: Path, progress: Progress, deadline: float) -> str:
        """One try: the whole body into `part`. Returns its sha256."""
        digest, done, stall = hashlib.sha256(), 0, self.limits.stall
        with open_url(remote.url, remote.headers, stall=stall, deadline=deadline) as body:
            _refuse_status(body.response, remote.shown)
            total = body.length or remote.size
            if total:
                self._check_size(total, remote)
                self._make_room(total)
            with part.open("wb") as stream:
                for piece in body.pieces():
                    done += len(piece)
                    self._check_size(done, remote)
                    stream.write(piece)
                    digest.update(piece)
                    progress(done, total)
                stream.flush()
                os.fsync(stream.fileno())
        return digest.hexdigest()

    def _publish(self, remote: RemoteFile, part: Path, path: Path, digest: str) -> None:
        """Checks the bytes, then makes them appear under their name."""
        _check_sha256(remote.sha256, digest, remote.shown)
        try:
            read_header(part)
        except LoraError as error:
            raise type(error)(f"{remote.shown}: {error.sentence}", error.hint) from error
        stat = part.stat()
        self._make_room(stat.st_size)  # again: the server may not have told the size beforehand
        record = Record(remote.shown, digest, stat.st_size, stat.st_mtime_ns, time.time())
        self._write_json(record_path(path), asdict(record))
        part.replace(path)
        _sync_folder(path.parent)

    def _check_size(self, size: int, remote: RemoteFile) -> None:
        if size > self.limits.file_bytes:
            raise LoraTooLarge(
                f"{remote.shown} is over the limit of {self.limits.file_bytes / 1e6:.0f} MB",
                "The limit is LORA_MAX_FILE_MB.",
            )

    # --- making room -----------------------------------------------------------------------------

    def _make_room(self, needed: int) -> None:
        """Removes the files used least recently until `needed` more bytes fit the budget."""
        budget = self.limits.total_bytes
        if budget is None:
            return
        for path in files_to_evict(self._by_last_use(), budget - needed, set(self._in_use)):
            log.info("evicting %s", path.name)
            path.unlink(missing_ok=True)
            record_path(path).unlink(missing_ok=True)

    def _by_last_use(self) -> list[tuple[Path, int]]:
        """(file, bytes) of what was downloaded, the one used longest ago first.

        Files without a record of their download are an operator's: they are neither counted nor removed.
        """
        used = []
        for path in self.files():
            with suppress(OSError, ValueError, TypeError):  # no record, or evicted just now
                beside = record_path(path)
                if Record(**json.loads(beside.read_text())).fetched is not None:
                    used.append((beside.stat().st_mtime, path, path.stat().st_size))
        return [(path, size) for _, path, size in sorted(used)]


def open_cache(root: Path, limits: Limits, hub: Hub) -> tuple[VolumeCache, tuple[str, ...]]:
    """The cache on the volume; where that cannot be written, on the container's own disk, and a warning."""
    cache = VolumeCache(root, limits, hub)
    try:
        cache.prepare()
    except OSError as error:
        words = f"the LoRA cache on the volume cannot be written ({error.strerror})"
        log.warning("%s: %s", root, words)
        cache = VolumeCache(FALLBACK_ROOT, limits, hub)
        cache.prepare()
        return cache, (f"{words}; LoRAs are kept on this container's disk",)
    return cache, ()


def files_to_evict(files: list[tuple[Path, int]], budget: int, keep: set[Path]) -> list[Path]:
    """Which of these (oldest use first) must go so that the rest fits the budget in bytes.

    Raises: CacheFull if even without all that may go, it does not fit; it says by how much.
    """
    excess = sum(size for _, size in files) - budget
    chosen = []
    for path, size in files:
        if excess <= 0:
            break
        if path not in keep:
            chosen.append(path)
            excess -= size
    if excess > 0:
        raise CacheFull(
            f"the LoRA cache lacks {excess / 1e6:.1f} MB of room",
            "Raise LORA_CACHE_MAX_GB or remove files.",
        )
    return chosen


def record_path(path: Path) -> Path:
    """Where the record of an adapter file lies."""
    return path.with_name(path.name + ".json")


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_sha256(expected: str | None, actual: str, shown: str) -> None:
    if expected and expected.lower() != actual:
        raise LoraCorrupt(
            f"{shown} has the sha256 {actual[:12]}…, not the {expected[:12]}… that was asked for"
        )


def _refuse_status(response: requests.Response, shown: str) -> None:
    """Turns an answer other than 200 into our error; what may pass by itself raises a requests error."""
    status = response.status_code
    if status in (404, 410):
        raise LoraNotFound(f"{shown} does not exist (HTTP {status})")
    if status in (401, 403):
        raise AccessDenied(f"{shown} refuses access (HTTP {status})", "It may need a token.")
    if status == 429 or status >= 500:
        raise requests.HTTPError(response=response)
    if status != 200:
        raise DownloadFailed(f"{shown} answered HTTP {status}")


def _kind(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"HTTP {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "it took too long"
    return "the connection failed or broke off"


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; some network filesystems cannot sync a folder, which loses nothing else."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        log.debug("cannot sync %s: %s", folder.name, error.strerror)
    finally:
        os.close(handle)
