"""The cache of adapter files on a volume that many workers share.

    <root>/NAME.safetensors        an adapter; NAME = <readable stem>-<16 hex of sha256(source)>
    <root>/NAME.safetensors.json   its record; its time is the last use
    <root>/NAME.safetensors.pin    if it is there, the adapter is never evicted
    <root>/.lookups/*.json         what the hub and Civitai answered lately
    <root>/.incoming/*             downloads under way, and the leases of who downloads
    <root>/.damaged/*              files that were found changed, for a day

A file appears under its name whole, checked and at once (`rename`), so a reader needs no lock and
never sees half of one. Files that an operator puts there by hand are served too.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from lora.durable import replace_durably
from lora.errors import (
    AccessDenied,
    CacheFull,
    DownloadFailed,
    LoraCorrupt,
    LoraError,
    LoraNotFound,
    nearest,
)
from lora.fetch.civitai import Civitai
from lora.fetch.download import Download, Fetched, Limits, NotModified, OnBytes
from lora.fetch.hub import Hub
from lora.fetch.sources import CachedName, Reference, RemoteFile
from lora.fetch.web import Web
from lora.formats.endings import SAFETENSORS
from lora.formats.header import read_header
from lora.formats.peft import CONFIG_BYTES, PEFT_CONFIG, config_beside
from lora.formats.pickles import convert, looks_like_pickle
from lora.volume.lease import Lease, Watch
from lora.volume.records import INCOMING, Record, pin_path, record_path, write
from lora.volume.refusals import Refusals
from lora.volume.resolver import Resolved, Resolver
from lora.volume.room import make_room
from lora.volume.shelf import CacheEntry, Damaged, Shelf, check_sha256, file_name, sha256_of

__all__ = ["FALLBACK_ROOT", "CacheEntry", "Limits", "OnBytes", "Resolved", "VolumeCache"]

log = logging.getLogger(__name__)

FALLBACK_ROOT = Path(tempfile.gettempdir()) / "loras"
"""Where LoRAs are kept when the volume cannot be written."""

FULL = (errno.ENOSPC, errno.EDQUOT)

POLL = 0.1
"""Seconds between two looks at what another worker downloads."""

"""Bytes of an adapter_config.json."""


@dataclass
class _Shared:
    """A download that several threads wait for."""

    future: Future[CacheEntry] = field(default_factory=Future)
    listeners: list[OnBytes] = field(default_factory=list)

    def tell(self, done: int, total: int | None) -> None:
        for listener in self.listeners:
            listener(done, total)


class VolumeCache:
    """Adapter files by source, on a folder that may be shared with other workers.

    Threads of one worker that ask for the same source share one download; workers share it through a
    lease, which nothing but bandwidth depends on: whoever publishes, publishes by atomic rename. Where
    the volume cannot be written, what comes in goes to `fallback`, and what is on the volume is served.
    """

    def __init__(
        self,
        root: Path,
        limits: Limits | None = None,
        web: Web | None = None,
        *,
        hub: Hub | None = None,
        civitai: Civitai | None = None,
        fallback: Path | None = None,
        lease: Callable[[Path, float], Lease] = Lease,
    ) -> None:
        self.limits = limits = limits or Limits()
        self.web = web or Web()
        self.shelf = Shelf(root, fallback, stale_after=2 * limits.timeout)
        self._refusals = Refusals(limits.refusal)
        self._resolver = Resolver(
            self.shelf, hub or Hub(), civitai or Civitai(self.web), self._refusals, limits
        )
        self._lease = lease
        self._guard = threading.Lock()
        self._running: dict[tuple[object, ...], _Shared] = {}
        self._in_use: dict[Path, int] = {}

    def resolve(self, reference: Reference) -> Resolved:
        """Where the reference's file is: in the cache by name, or at a URL.

        Asks the hub or Civitai if it must, downloads nothing. Raises: LoraError.
        """
        return self._resolver.resolve(reference)

    def get(self, resolved: Resolved, progress: OnBytes | None = None) -> CacheEntry:
        """The whole and checked file of a place that `resolve` found. Raises: LoraError."""
        place = resolved.location
        if isinstance(place, CachedName):
            return self.find(place)
        entry = self.fetch(place, progress, refresh=resolved.refresh)
        if resolved.warning:
            entry = replace(entry, warnings=(resolved.warning, *entry.warnings))
        return entry

    # --- looking ---------------------------------------------------------------------------------

    def path_for(self, remote: RemoteFile) -> Path:
        """Where this source's file is on the volume, or will be: the same on every worker, in every run."""
        return self.shelf.root / file_name(remote)

    def find(self, cached: CachedName) -> CacheEntry:
        """The file of this name, with or without its extension, or the PEFT folder; its use is noted.

        A pickle is converted once. Raises: LoraNotFound, with the nearest names; SourceInvalid if the
        name, or a link in it, leads out of the cache; LoraError if the file cannot be read.
        """
        path = self.shelf.existing(cached.name)
        if path is None:
            files = self.shelf.files()
            names = [str(p.relative_to(self.shelf.root_of(p))) for p in files]
            stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
            by_stem = nearest(cached.name.removesuffix(SAFETENSORS), stems)
            hint = by_stem or f"The cache holds {len(names)} files."
            raise LoraNotFound(f"the cache has no file {cached.name!r}", hint)
        try:
            entry = self.shelf.entry(path) if path.suffix == SAFETENSORS else self._converted(path)
        except Damaged as error:
            raise LoraCorrupt(str(error), "Name its source, and it is fetched again.") from error
        except FileNotFoundError:
            raise LoraNotFound(f"{cached.name} was removed just now") from None
        except OSError as error:
            words = f"{cached.name} cannot be read ({error.strerror})"
            raise LoraCorrupt(words, "The volume may be gone.") from error
        check_sha256(cached.sha256, entry.record.origin_sha256, entry.name)
        return entry

    def _converted(self, path: Path) -> CacheEntry:
        """An operator's pickle as .safetensors, written once per version of the file."""
        stat = path.stat()
        name = str(path.relative_to(self.shelf.root_of(path)))
        made = RemoteFile(
            "", f"file:{name}:{stat.st_size}:{stat.st_mtime_ns}", name, path.name, fixed=True
        )
        with suppress(Damaged):
            if kept := self.shelf.kept(made):
                return kept
        root = self.shelf.prepare()
        part = root / INCOMING / f"{uuid.uuid4().hex}.part"
        try:
            shutil.copyfile(path, part)
            fetched = Fetched(sha256_of(part), stat.st_size, None, None)
            return self._publish(root, made, part, fetched, config_beside(path))
        finally:
            part.unlink(missing_ok=True)

    # --- fetching --------------------------------------------------------------------------------

    def fetch(
        self, remote: RemoteFile, progress: OnBytes | None = None, *, refresh: bool = False
    ) -> CacheEntry:
        """The source's file, downloaded unless it is there already.

        What is there and older than the TTL is asked for again, as far as its content can change; if the
        source cannot be had then, the old file serves, with a warning. `refresh` asks in any case, and
        fails if the source does. Whatever fails, nothing new appears under the file's name and no
        temporary file stays. Raises: LoraError.
        """
        key = remote.identity, remote.sha256, refresh
        with self._guard:
            shared = self._running.get(key)
            ours = shared is None
            if shared is None:
                shared = self._running[key] = _Shared()
            if progress:
                shared.listeners.append(progress)
        if not ours:
            return replace(shared.future.result(), downloaded=False)
        try:
            entry = self._fetch(remote, shared.tell, refresh)
        except BaseException as error:
            own = isinstance(error, Exception)
            shared.future.set_exception(
                error if own else DownloadFailed(f"{remote.shown}: the download was broken off")
            )
            raise
        else:
            shared.future.set_result(entry)
            return entry
        finally:
            with self._guard:
                del self._running[key]

    def _fetch(self, remote: RemoteFile, progress: OnBytes, refresh: bool) -> CacheEntry:
        begun = time.time()
        try:
            kept = self.shelf.kept(remote)
        except Damaged as error:
            entry = self._fetch_anew(remote, None, progress, begun)
            return replace(entry, warnings=(f"{error}; it was fetched again",))
        if kept and (remote.fixed or (not refresh and self._is_current(kept, remote))):
            return kept
        try:
            # With an old file at hand, one job waits for a source in trouble, and not each.
            kinds = (LoraError,) if kept else (LoraNotFound, AccessDenied)
            with self._refusals.remembered(remote.identity, ask_anyway=refresh, kinds=kinds):
                return self._fetch_anew(remote, kept, progress, begun)
        except LoraError as error:
            if kept is None or refresh:
                raise
            words = f"{kept.name} may be out of date: {error.sentence}"
            return replace(kept, warnings=(words,))

    def _is_current(self, kept: CacheEntry, remote: RemoteFile, since: float | None = None) -> bool:
        """Whether the file need not be asked for: its content cannot change, or it was asked for lately."""
        asked = kept.record.asked
        if since is not None:
            return (asked or 0.0) >= since
        if remote.fixed or remote.sha256:
            return True
        return asked is not None and time.time() - asked < self.limits.ttl

    def _fetch_anew(
        self, remote: RemoteFile, kept: CacheEntry | None, progress: OnBytes, begun: float
    ) -> CacheEntry:
        deadline = time.monotonic() + self.limits.timeout
        for root in self.shelf.writable():
            try:
                return self._fetch_into(root, remote, kept, progress, begun, deadline)
            except OSError as error:
                if error.errno in FULL:
                    raise CacheFull(
                        "the volume of the LoRA cache is full", "Remove files, or make it larger."
                    ) from error
                self.shelf.lost(root, error)
        raise CacheFull("the LoRA cache cannot be written", "The volume may be gone or read-only.")

    def _fetch_into(
        self,
        root: Path,
        remote: RemoteFile,
        kept: CacheEntry | None,
        progress: OnBytes,
        begun: float,
        deadline: float,
    ) -> CacheEntry:
        """The file by this worker's download, or by that of another which holds the lease."""

        def look() -> CacheEntry | None:
            try:
                return self.shelf.kept(remote)
            except Damaged:
                return None

        def is_news(found: CacheEntry | None) -> TypeGuard[CacheEntry]:
            return found is not None and self._is_current(found, remote, begun if kept else None)

        path = root / INCOMING / f"{file_name(remote)}.lease"
        lease, watch = self._lease(path, self.limits.lease), Watch(path, self.limits.lease)
        while not lease.take():
            if is_news(found := look()):
                return found
            if watch.is_dead():
                if not watch.remove():
                    break  # nobody can have it any more: then all of us download
            elif time.monotonic() > deadline:
                raise DownloadFailed(
                    f"{remote.shown} is being downloaded by another worker, which takes too long",
                    "Try again later.",
                )
            else:
                time.sleep(POLL)
        with lease:
            if is_news(found := look()):
                return found
            # What lies there now, not what lay there before waiting: a 304 says that this is the newest.
            return self._download(root, remote, found, progress, deadline)

    def _download(
        self,
        root: Path,
        remote: RemoteFile,
        kept: CacheEntry | None,
        progress: OnBytes,
        deadline: float,
    ) -> CacheEntry:
        part = root / INCOMING / f"{Path(file_name(remote)).stem[:60]}-{uuid.uuid4().hex}.part"
        known = {}
        if kept and kept.path.is_relative_to(root):
            about = {"If-None-Match": kept.record.etag, "If-Modified-Since": kept.record.modified}
            known = {name: value for name, value in about.items() if value}
        try:
            download = Download(self.web, remote, part, self.limits, progress, deadline=deadline)
            keep = self.in_use(kept.path) if kept else nullcontext()
            with keep:
                fetched = download.run(
                    lambda more: self._make_room(root, more, more, root / file_name(remote)), known
                )
            config = self._config(root, remote, deadline)
            return self._publish(root, remote, part, fetched, config)
        except NotModified:
            if kept is None:
                raise DownloadFailed(f"{remote.shown} answered HTTP 304") from None
            record = replace(kept.record, checked=time.time())
            write(root, record_path(kept.path), record)
            return replace(kept, record=record)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _config(self, root: Path, remote: RemoteFile, deadline: float) -> str | None:
        """The config that goes with a PEFT adapter: without it, its scale is not known."""
        if remote.config_url is None:
            return None
        part = root / INCOMING / f"{uuid.uuid4().hex}.part"
        about = RemoteFile(remote.config_url, "", f"{remote.shown}'s {PEFT_CONFIG}", PEFT_CONFIG)
        try:
            limits = replace(self.limits, file_bytes=CONFIG_BYTES)
            Download(self.web, about, part, limits, deadline=deadline).run(lambda size: None)
            return part.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LoraCorrupt(f"{about.shown} is no text") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _publish(
        self, root: Path, remote: RemoteFile, part: Path, fetched: Fetched, config: str | None
    ) -> CacheEntry:
        """Checks the bytes, then makes them appear under their name: the record first, so that a file with
        a record is never taken for an operator's.
        """
        check_sha256(remote.sha256, fetched.sha256, remote.shown)
        path = root / file_name(remote)
        converted = part.with_suffix(".converted.part")
        try:
            sha256 = fetched.sha256
            if looks_like_pickle(part):
                convert(part, converted, self.limits.file_bytes)
                part, sha256 = converted, sha256_of(converted)
            read_header(part)
            stat = _stamped(part, sha256)
            # Again: not every server tells the size first.
            self._make_room(root, stat.st_size, 0, path)
            now = time.time()
            record = Record(
                source=remote.shown,
                sha256=sha256,
                size=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
                fetched=now,
                checked=now,
                etag=fetched.etag,
                modified=fetched.modified,
                source_sha256=fetched.sha256 if sha256 != fetched.sha256 else None,
                config=config,
            )
            write(root, record_path(path), record)
            replace_durably(part, path)
        except LoraError as error:
            if remote.shown in error.sentence:
                raise
            raise type(error)(f"{remote.shown}: {error.sentence}", error.hint) from error
        finally:
            with suppress(OSError):
                converted.unlink(missing_ok=True)
        return CacheEntry(path, path.name, record, True, self.shelf.is_local(path))

    # --- keeping ---------------------------------------------------------------------------------

    def _make_room(self, root: Path, size: int, to_write: int, instead_of: Path) -> None:
        with self._guard:
            keep = set(self._in_use)
        make_room(root, size, to_write, self.limits.total_bytes, keep, instead_of)

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

    def pin(self, name: str) -> None:
        """Keeps a file for ever, on all workers. Raises: LoraNotFound, SourceInvalid, CacheFull."""
        try:
            pin_path(self.find(CachedName(name)).path).touch()
        except OSError as error:
            raise CacheFull(f"{name} cannot be pinned ({error.strerror})") from error

    def delete(self, name: str) -> str:
        """Removes a file, its record and its pin, whoever put it there; its full name.

        A job that has it read already is not disturbed. Raises: LoraNotFound, SourceInvalid, CacheFull.
        """
        path = self.shelf.existing(name)
        if path is None:
            raise LoraNotFound(f"the cache has no file {name!r}")
        try:
            for one in (path, record_path(path), pin_path(path)):
                one.unlink(missing_ok=True)
        except OSError as error:
            raise CacheFull(f"{name} cannot be deleted ({error.strerror})") from error
        return str(path.relative_to(self.shelf.root_of(path)))

    def unpin(self, name: str) -> None:
        """Takes a pin away, if there is one. Raises: LoraNotFound, SourceInvalid, CacheFull."""
        try:
            pin_path(self.find(CachedName(name)).path).unlink(missing_ok=True)
        except OSError as error:
            raise CacheFull(f"{name} cannot be unpinned ({error.strerror})") from error


def _stamped(path: Path, sha256: str) -> os.stat_result:
    """Gives a file a time that goes with its content, and returns its state.

    Clocks of file systems tick every few milliseconds: two contents of one size, published within a tick,
    would otherwise have the same time, and one's record would fit the other.
    """
    now = time.time_ns() // 1_000_000 * 1_000_000 + int(sha256[:8], 16) % 1_000_000
    os.utime(path, ns=(now, now))
    return path.stat()
