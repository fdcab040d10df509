"""Fetching a source into the cache: once per worker, and by one of the workers that share a volume."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora.durable import part_file
from lora.errors import CacheFull, DownloadFailed, LoraCorrupt, LoraError, LoraTooLarge, naming
from lora.fetch.copying import copy_file
from lora.fetch.download import Download, NotModified, OnBytes
from lora.fetch.sources import RemoteFile
from lora.fetch.web import Web
from lora.formats.peft import CONFIG_BYTES, PEFT_CONFIG, Beside, beside, template_in
from lora.volume.lease import Lease
from lora.volume.records import INCOMING, record_path, write
from lora.volume.shelf import CacheEntry, Damaged, Shelf, file_name

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)

POLL = 0.1
"""Seconds between two looks at whether another worker is done."""


@dataclass
class Fetch:
    """One source's file on its way into the cache. Whatever fails, no temporary file stays."""

    remote: RemoteFile
    shelf: Shelf
    web: Web
    lease: Callable[[Path, float], Lease]
    on_bytes: OnBytes
    copy: Path | None = None
    """Where the same file lies on this machine; what belongs to it lies beside it."""
    deadline: float = 0.0
    """When `run` must be done, by time.monotonic()."""

    def is_current(self, entry: CacheEntry) -> bool:
        """Whether the file need not be asked for: its content cannot change, or it was asked for lately."""
        asked = entry.record.asked
        # Another worker's clock may be ahead of this one's.
        lately = asked is not None and abs(time.time() - asked) < self.shelf.limits.ttl
        return self.remote.fixed or bool(self.remote.sha256) or lately

    def run(self, old: CacheEntry | None) -> CacheEntry:
        """The file as its source has it now. `old`: the version that the cache has. Raises: LoraError."""
        self.deadline = time.monotonic() + self.shelf.limits.timeout
        for root in self.shelf.writable():
            try:
                return self._into(root, old)
            except OSError as error:
                if error.errno in FULL:
                    raise CacheFull(
                        "the volume of the LoRA cache is full", "Remove files, or make it larger."
                    ) from error
                self.shelf.lost(root, error)
        raise CacheFull("the LoRA cache cannot be written", "The volume may be gone or read-only.")

    def _into(self, root: Path, old: CacheEntry | None) -> CacheEntry:
        def newer(entry: CacheEntry | None) -> CacheEntry | None:
            """The entry if another worker fetched it meanwhile."""
            if entry is None or (old and entry.record.asked == old.record.asked):
                return None
            return entry if old or self.is_current(entry) else None

        path = root / INCOMING / f"{file_name(self.remote)}.lease"
        lease = self.lease(path, self.shelf.limits.lease)
        sentence = (
            f"{self.remote.shown} is being downloaded by another worker, which takes too long"
        )
        too_late = DownloadFailed(sentence, "Try again later.")
        if entry := lease.wait(lambda: newer(self._kept()), self.deadline, POLL, too_late):
            return entry
        with lease:
            # This one may be newer than before waiting. The request names it, so that a 304 confirms it.
            kept = self._kept()
            return newer(kept) or self._copied(root) or self._download(root, kept)

    def _kept(self) -> CacheEntry | None:
        try:
            return self.shelf.kept(self.remote)
        except Damaged:
            return None

    def _copied(self, root: Path) -> CacheEntry | None:
        """The file from where it lies on this machine; None if there is none that can be used, which is
        logged. Raises: LoraTooLarge, CacheFull, OSError.
        """
        if self.copy is None:
            return None
        path, room = root / file_name(self.remote), self.shelf.room
        try:
            with part_file(root / INCOMING, path.name) as part, naming(self.remote.shown):
                fetched = copy_file(
                    self.copy,
                    part,
                    self.shelf.limits,
                    lambda size: room.make(root, size, size, path),
                    self.on_bytes,
                    deadline=self.deadline,
                )
                entry = self.shelf.publish(part, root, self.remote, fetched, beside(self.copy))
        except (LoraTooLarge, CacheFull):
            raise
        except LoraError as error:
            log.warning("%s; it is fetched from the hub", error.sentence)
            return None
        log.info("%s was copied from %s", self.remote.shown, self.copy)
        return entry

    def _download(self, root: Path, kept: CacheEntry | None) -> CacheEntry:
        room, path, headers = self.shelf.room, root / file_name(self.remote), {}
        if kept and kept.path.is_relative_to(root):
            record = kept.record
            conditions = {"If-None-Match": record.etag, "If-Modified-Since": record.modified}
            headers = {name: value for name, value in conditions.items() if value}
        try:
            with part_file(root / INCOMING, path.name) as part:
                limits = self.shelf.limits
                download = Download(
                    self.web, self.remote, part, limits, self.on_bytes, deadline=self.deadline
                )
                with room.in_use(kept.path) if kept else nullcontext():
                    fetched = download.run(lambda more: room.make(root, more, more, path), headers)
                return self.shelf.publish(part, root, self.remote, fetched, self._beside(root))
        except NotModified:
            if kept is None:
                raise DownloadFailed(f"{self.remote.shown} answered HTTP 304") from None
            record = replace(kept.record, checked=time.time())
            write(root, record_path(kept.path), record)
            return replace(kept, record=record)

    def _beside(self, root: Path) -> Beside:
        """What belongs to a PEFT adapter: without its config, nobody knows its scale."""
        config = template = None
        if self.remote.config_url:
            config = self._text(root, self.remote.config_url, PEFT_CONFIG)
        if url := self.remote.template_url:
            name = url.rsplit("/", 1)[-1]
            with naming(self.remote.shown):
                template = template_in(name, self._text(root, url, name))
        return Beside(config, template)

    def _text(self, root: Path, url: str, name: str) -> str:
        file = RemoteFile(url, "", f"{self.remote.shown}'s {name}", name)
        limits = replace(self.shelf.limits, file_bytes=CONFIG_BYTES)
        with part_file(root / INCOMING, name) as part:
            Download(self.web, file, part, limits, deadline=self.deadline).run(lambda size: None)
            try:
                return part.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise LoraCorrupt(f"{file.shown} is no text") from error


@dataclass
class _Running:
    """A fetch that several threads wait for."""

    future: Future[CacheEntry] = field(default_factory=Future)
    listeners: list[OnBytes] = field(default_factory=list)

    def on_bytes(self, done: int, total: int | None) -> None:
        for listener in self.listeners:
            listener(done, total)


class SharedFetches:
    """The fetches that run in this worker now, by what they fetch."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: dict[Hashable, _Running] = {}

    def run(
        self,
        key: Hashable,
        shown: str,
        fetch: Callable[[OnBytes], CacheEntry],
        on_bytes: OnBytes | None,
    ) -> CacheEntry:
        """The outcome of `fetch`, or of another thread's fetch with the same key that still runs."""
        with self._guard:
            ours = key not in self._running
            running = self._running.setdefault(key, _Running())
            if on_bytes:
                running.listeners.append(on_bytes)
        if not ours:
            return replace(running.future.result(), downloaded=False)
        try:
            entry = fetch(running.on_bytes)
        except BaseException as error:
            ended = DownloadFailed(f"{shown}: the download was broken off")
            running.future.set_exception(error if isinstance(error, Exception) else ended)
            raise
        else:
            running.future.set_result(entry)
            return entry
        finally:
            with self._guard:
                del self._running[key]
