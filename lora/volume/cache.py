"""The cache of adapter files on a volume that many workers share.

    <root>/NAME.safetensors             an adapter; NAME = <readable stem>-<16 hex of sha256(source)>
    <root>/NAME.safetensors.json        its record; its time is the last use
    <root>/NAME.safetensors.pin         if it is there, the adapter is never evicted
    <root>/NAME.safetensors.state.json  what the library knows of it
    <root>/.lookups/*.json              what the hub and Civitai answered lately
    <root>/.incoming/*                  downloads under way, and the leases of who downloads
    <root>/.damaged/*                   files that were found changed, for a day

A file appears under its name whole, checked and at once (`rename`), so a reader needs no lock and
never sees half of one. Files that an operator puts there by hand are served too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lora.errors import LoraCorrupt, LoraError, LoraNotFound, nearest
from lora.fetch.civitai import Civitai
from lora.fetch.download import Limits, OnBytes
from lora.fetch.hub import Hub
from lora.fetch.redaction import redact_url
from lora.fetch.sources import CachedName, Reference, RemoteFile
from lora.fetch.web import Web
from lora.formats.endings import SAFETENSORS
from lora.volume.adapters import delete
from lora.volume.fetching import Fetch, SharedFetches
from lora.volume.lease import Lease
from lora.volume.records import pin_path, write_errors_as
from lora.volume.resolver import REFUSED, Refusals, Resolved, Resolver
from lora.volume.shelf import CacheEntry, Damaged, Shelf, check_sha256, file_name, opened_by

__all__ = ["FALLBACK_ROOT", "CacheEntry", "Limits", "OnBytes", "Resolved", "VolumeCache"]

FALLBACK_ROOT = Path(tempfile.gettempdir()) / "loras"
"""Where LoRAs are kept when the volume cannot be written."""


class VolumeCache:
    """Adapter files by source, on a folder that may be shared with other workers.

    Threads of one worker that ask for the same source share one download, and so do workers, by a lease. The
    lease only saves bandwidth: every file is published by an atomic rename. Where the volume cannot be
    written, new files go to `fallback`, and the volume's files are served.
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
        self.limits, self.web, self._lease = limits or Limits(), web or Web(), lease
        self.shelf = Shelf(root, fallback, self.limits)
        self.in_use = self.shelf.room.in_use
        """Keeps a file from being evicted by this worker while the block runs."""
        self._refusals = refusals = Refusals(self.limits.refusal)
        self._resolver = Resolver(self.shelf, hub or Hub(), civitai or Civitai(self.web), refusals)
        self._shared = SharedFetches()

    def resolve(self, reference: Reference) -> Resolved:
        """Where the reference's file is. Asks a hub if it must, and downloads nothing. Raises: LoraError."""
        return self._resolver.resolve(reference)

    def get(self, resolved: Resolved, on_bytes: OnBytes | None = None) -> CacheEntry:
        """The whole and checked file of a location that `resolve` found, downloaded unless it is there.

        A file that is older than the TTL is asked for again if its content can change; if the source fails
        then, the old file serves, with a warning. `refresh` asks in any case, and fails if the source does.
        A file that another request's token opened is asked for with this one's, unless the rules share it.
        Whatever fails, nothing new appears under the file's name and no temporary file stays.
        Raises: LoraError.
        """
        location, refresh, warning, copy = resolved
        if isinstance(location, CachedName):
            return self.find(location)
        key = location.identity, location.sha256, location.credential, refresh
        fetch = partial(self._fetch, location, refresh, copy)
        entry = self._shared.run(key, location.shown, fetch, on_bytes)
        return entry.warned(warning) if warning else entry

    def path_for(self, remote: RemoteFile) -> Path:
        """Where this source's file is on the volume, or will be."""
        return self.shelf.root / file_name(remote)

    def find(self, cached: CachedName) -> CacheEntry:
        """The file of this name, with or without its extension, or the PEFT folder; its use is noted.

        A pickle is converted once. Raises: LoraNotFound, with the nearest names; SourceInvalid if the
        name, or a link in it, leads out of the cache; LoraError if the file cannot be read.
        """
        path = self.shelf.existing(cached.name)
        if path is None:
            raise self._not_found(cached.name)
        is_pickle = path.suffix != SAFETENSORS
        try:
            entry = self.shelf.converted(path) if is_pickle else self.shelf.entry(path)
        except Damaged as error:
            raise LoraCorrupt(str(error), "Name its source, and it is fetched again.") from error
        except FileNotFoundError:
            raise LoraNotFound(f"{cached.name} was removed just now") from None
        except OSError as error:
            sentence = f"{cached.name} cannot be read ({error.strerror})"
            raise LoraCorrupt(sentence, "The volume may be gone.") from error
        check_sha256(cached.sha256, entry.record.origin_sha256, entry.name)
        return entry

    def _not_found(self, name: str, *, own: bool = False) -> LoraNotFound:
        hint = nearest(name.removesuffix(SAFETENSORS), self.shelf.names(own=own))
        hint = hint or f"The cache holds {len(self.shelf.names(own=True))} files."
        return LoraNotFound(f"the cache has no file {redact_url(name)!r}", hint)

    def _fetch(
        self, remote: RemoteFile, refresh: bool, copy: Path | None, on_bytes: OnBytes
    ) -> CacheEntry:
        fetch = Fetch(remote, self.shelf, self.web, self._lease, on_bytes, copy)
        try:
            kept = self.shelf.kept(remote)
        except Damaged as error:
            return fetch.run(None).warned(f"{error}; it was fetched again")
        open_to_all = self.web.rules.share_private or kept is None or kept.record.opened_by is None
        ours = open_to_all or (kept and kept.record.opened_by == opened_by(remote))
        if kept and ours and (remote.fixed or (not refresh and fetch.is_current(kept))):
            return kept
        try:
            # If there is an old file, only one job waits for a source in trouble.
            kinds = (LoraError,) if kept else REFUSED
            key = f"{remote.url} {remote.token}"  # another signature or token may open it
            with self._refusals.remembered(key, ask_anyway=refresh, kinds=kinds):
                return fetch.run(kept)
        except LoraError as error:
            if kept is None or refresh or not ours:
                raise
            return kept.warned(f"{kept.name} may be out of date: {error.sentence}")

    def pin(self, name: str) -> None:
        """Keeps a file for ever, on all workers. Raises: LoraNotFound, SourceInvalid, CacheFull."""
        with write_errors_as(f"{redact_url(name)} cannot be pinned"):
            self._pin(name).touch()

    def unpin(self, name: str) -> None:
        """Takes a pin away, if there is one. Raises: LoraNotFound, SourceInvalid, CacheFull."""
        with write_errors_as(f"{redact_url(name)} cannot be unpinned"):
            self._pin(name).unlink(missing_ok=True)

    def _pin(self, name: str) -> Path:
        path = self.shelf.existing(name)
        if path is not None and self.shelf.is_own(path):
            found = self.find(CachedName(name)).path
            if self.shelf.is_own(found):  # else it was removed just now, and there is one behind it
                return pin_path(found)
        raise self._not_found(name, own=True)

    def delete(self, name: str) -> str:
        """Removes an adapter and all that belongs to it, whoever put it there; the full name of its file.

        A job that has it read already is not disturbed. Raises: LoraNotFound, SourceInvalid, CacheFull.
        """
        adapter = self.shelf.adapter(name)
        if adapter is None:
            raise self._not_found(name, own=True)
        with write_errors_as(f"{redact_url(name)} cannot be deleted"):
            delete(adapter)
        return adapter.weights or adapter.path
